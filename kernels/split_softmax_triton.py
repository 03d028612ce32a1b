"""A softmax over columns that come block by block and that several programs share, as kernels of attention have it.

A program keeps each row's highest score, its sum of weights and its weighted values; `launch_join` puts the parts of
all programs together.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691), section 3.1, and Flash-Decoding for the parts.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_jit: Callable[..., Any] = triton.jit


def parts_for(heads: int, splits: int, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for weighted values [heads, splits, rows, width], and highest scores and sums of each row, float32."""
    part = torch.empty(heads, splits, rows, width, dtype=torch.float32, device=device)
    peak, total = (torch.empty(part.shape[:3], dtype=torch.float32, device=device) for _ in range(2))
    return part, peak, total


def launch_join(part: Tensor, peak: Tensor, total: Tensor, y: Tensor) -> None:
    """Write the output [B, Hq, N, E] from the parts [B H, splits, N Hq / H, E] of its rows."""
    heads, splits, rows, width = part.shape
    # Few rows are joined by many programs, of 32 channels each.
    block = min(32, max(16, triton.next_power_of_2(width)))
    _join_kernel[(heads, rows, triton.cdiv(width, block))](
        part, peak, total, y, y.shape[2], rows, splits, WIDTH=width, BLOCK_E=block,
        BLOCK_S=triton.next_power_of_2(splits), num_warps=1 if splits <= 32 else 4,
    )  # fmt: skip


@_jit
def softmax_step(s, most, axis: tl.constexpr):
    """Weights of new scores `s`, the factor of all before, and the highest score of each row by now.

    `axis` is that of the columns: `s` is [rows, columns], or [columns, rows] with 0.
    """
    higher = tl.maximum(most, tl.max(s, axis))
    # A row that has seen nothing yet has no maximum; its weights are zero.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp(s - tl.expand_dims(base, axis)), tl.exp(most - base), higher


@_jit
def _join_kernel(
    part, peak, total, y, count, rows, splits, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Some channels of a row: its parts, each weighed by how far its maximum is below the highest."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, e = tl.arange(0, BLOCK_S), tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    place = (head * splits + split) * rows + row
    most = tl.load(peak + place, mask=split < splits, other=float("-inf"))
    highest = tl.max(most, 0)
    # A query in the padding saw nothing: no maximum, no weight, and a result of zero.
    factor = tl.exp(most - tl.where(highest == float("-inf"), 0.0, highest))
    weight = tl.sum(tl.load(total + place, mask=split < splits, other=0.0) * factor, 0)
    weight = tl.where(weight == 0.0, 1.0, weight)
    mask = (split < splits)[:, None] & (e < WIDTH)[None, :]
    x = tl.sum(tl.load(part + place[:, None] * WIDTH + e[None, :], mask=mask, other=0.0) * factor[:, None], 0) / weight
    group = rows // count
    out = (head * group + row % group) * count + row // group
    tl.store(y + out * WIDTH + e, x.to(y.dtype.element_ty), mask=e < WIDTH)
