"""The Triton kernel of `nm_sparsify`: ranks by counting, all pairs of a block in registers."""

# ruff: noqa: ANN001, ANN201, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_jit: Callable[..., Any] = triton.jit

PAIRS = 4096
"""Comparisons of a program: 32 a thread."""


def launch(x: Tensor, factors: Tensor | None, n: int, m: int) -> Tensor:
    """Run the Triton kernel, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    rows = x.contiguous()
    y = torch.empty_like(rows)
    blocks = rows.numel() // m
    if blocks:
        together = PAIRS // (m * m)
        _kernel[(triton.cdiv(blocks, together),)](
            rows, rows if factors is None else factors.contiguous(), y, blocks, x.shape[-1] // m, n,
            WEIGHTED=factors is not None, TOGETHER=together, M=m,
        )  # fmt: skip
    return y


@_jit
def ranks(scores, M: tl.constexpr):
    """How many scores of a block [B, M] come before each: larger ones, and equal ones of lower channels."""
    keys = scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    lanes = tl.arange(0, M)
    mine, other = keys[:, :, None], keys[:, None, :]
    first = (lanes[None, :] < lanes[:, None])[None, :, :]
    return tl.sum(((other > mine) | ((other == mine) & first)).to(tl.int32), 2)


@_jit
def _kernel(x, factors, y, blocks, blocks_of_row, n, WEIGHTED: tl.constexpr, TOGETHER: tl.constexpr, M: tl.constexpr):
    """Some blocks a program."""
    block = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    lanes = tl.arange(0, M)
    inside = (block < blocks)[:, None]
    at = block.to(tl.int64)[:, None] * M + lanes[None, :]
    v = tl.load(x + at, mask=inside, other=0.0)
    scores = tl.abs(v.to(tl.float32))
    if WEIGHTED:
        scores *= tl.load(factors + (block % blocks_of_row)[:, None] * M + lanes[None, :], mask=inside, other=0.0)
    tl.store(y + at, tl.where(ranks(scores, M) < n, v, 0.0), mask=inside)
