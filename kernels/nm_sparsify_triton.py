"""The Triton kernel of `nm_sparsify`, and the selection that it shares with `nm_int8_linear`'s: ranks by counting.

A row stays in registers as a tile [blocks, M]. Ranks are counted one channel of all blocks at a time, M steps, so that
no more than a few registers a value are needed whatever M is.
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

LENGTH = 2048
"""Channels of a program."""


def launch(x: Tensor, factors: Tensor | None, n: int, m: int) -> Tensor:
    """Run the Triton kernel, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    rows = x.contiguous()
    y = torch.empty_like(rows)
    if rows.numel():
        k = x.shape[-1]
        block = min(1 << (k - 1).bit_length(), LENGTH)
        _kernel[(rows.numel() // k, triton.cdiv(k, block))](
            rows, rows if factors is None else factors.contiguous(), y, k, n,
            WEIGHTED=factors is not None, BLOCKS=block // m, M=m, num_warps=warps_of(block),
        )  # fmt: skip
    return y


def warps_of(block: int) -> int:
    """Warps for a tile: 16 values a thread, which its ranks and scores are kept beside."""
    return max(1, min(16, block // 512))


@_jit
def selected(row, factors, start, K, n, WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr, M: tl.constexpr):
    """Values [BLOCKS, M] of a row from a channel on, float32, zero where they are not kept."""
    lanes = tl.arange(0, M)[None, :]
    at = start + tl.arange(0, BLOCKS)[:, None] * M + lanes
    v = tl.load(row + at, mask=at < K, other=0.0).to(tl.float32)
    scores = tl.abs(v)
    if WEIGHTED:
        scores *= tl.load(factors + at, mask=at < K, other=0.0)
    # Larger scores come first, and equal ones of lower channels.
    keys = scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    rank = tl.zeros([BLOCKS, M], tl.int32)
    for j in tl.static_range(M):
        other = tl.sum(tl.where(lanes == j, keys, 0), 1)[:, None]
        rank += ((other > keys) | ((other == keys) & (j < lanes))).to(tl.int32)
    return tl.where(rank < n, v, 0.0)


@_jit
def _kernel(x, factors, y, K, n, WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr, M: tl.constexpr):
    """Some blocks of a row a program."""
    row = tl.program_id(0).to(tl.int64) * K
    start = tl.program_id(1) * BLOCKS * M
    at = start + tl.arange(0, BLOCKS)[:, None] * M + tl.arange(0, M)[None, :]
    v = selected(x + row, factors, start, K, n, WEIGHTED, BLOCKS, M)
    tl.store(y + row + at, v.to(y.dtype.element_ty), mask=at < K)
