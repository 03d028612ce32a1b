"""The Triton kernel of `fake_quantize`. Imported where there is Triton only."""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .token_grid_triton import round_half_even, step_and_zero

_jit: Callable[..., Any] = triton.jit


def launch(x: Tensor, bits: int, group: int, clip: float = 1.0) -> Tensor:
    """Run the Triton kernel, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    rows = x.reshape(-1, group).contiguous()
    y = torch.empty_like(rows)
    if len(rows):
        block = triton.next_power_of_2(group)
        together = max(1, 1024 // block)
        _kernel[(triton.cdiv(len(rows), together),)](
            rows, y, len(rows), group, clip, LEVELS=2**bits - 1, ROWS=together, BLOCK=block
        )
    return y.view(x.shape)


@_jit
def _kernel(x, y, M, K, clip, LEVELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows a program, a thousand elements together."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    step, zero = step_and_zero(tl.min(v, 1), tl.max(v, 1), tl.sum(v - v, 1), clip, LEVELS)
    q = (
        tl.minimum(tl.maximum(round_half_even(tl.div_rn(v, step[:, None])) + zero[:, None], 0.0), LEVELS)
        - zero[:, None]
    )
    tl.store(y + at, (q * step[:, None]).to(y.dtype.element_ty), mask=inside)
