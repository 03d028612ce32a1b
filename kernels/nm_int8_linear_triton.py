"""The Triton kernel of `nm_int8_linear`: select and quantize in one pass over a token; the product is `int8_linear`'s.

A token stays in registers as a tile [blocks, M]. Ranks are counted one channel of all blocks at a time, M steps, so
that no more than a few registers a value are needed whatever M is.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int8_linear import _round, _step, launch_product
from .nm_sparsify_triton import selected, warps_of

_jit: Callable[..., Any] = triton.jit

LONGEST = 8192
"""Channels that one program holds; a longer token is selected twice, once for its step and once to be written."""


def launch(
    x: Tensor, factors: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """Run the Triton kernels, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    quantized, token_scale = launch_selection(x, factors, n, m)
    return launch_product(quantized, token_scale, weight, scale, bias, x.dtype).view(*x.shape[:-1], len(weight))


def launch_selection(x: Tensor, factors: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Selected tokens as int8 ``[T, K]`` and their steps float32 ``[T]``."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    count, k = tokens.shape
    quantized = torch.empty_like(tokens, dtype=torch.int8)
    token_scale = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        block = min(1 << (k - 1).bit_length(), LONGEST)
        _select_kernel[(count,)](
            tokens, tokens if factors is None else factors.contiguous(), quantized, token_scale, k, n,
            WEIGHTED=factors is not None, BLOCKS=block // m, M=m, ONE_BLOCK=k <= block,
            num_warps=warps_of(block),
        )  # fmt: skip
    return quantized, token_scale


@_jit
def _select_kernel(
    x, factors, quantized, token_scale, K, n,
    WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr, M: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    row = tl.program_id(0).to(tl.int64)
    source, target = x + row * K, quantized + row * K
    at = tl.arange(0, BLOCKS)[:, None] * M + tl.arange(0, M)[None, :]
    if ONE_BLOCK:
        v = selected(source, factors, 0, K, n, WEIGHTED, BLOCKS, M)
        step = _step(tl.max(tl.max(tl.abs(v), 1), 0), tl.sum(tl.sum(v - v, 1), 0))
        tl.store(target + at, _round(v, step), mask=at < K)
    else:
        amax = tl.zeros([BLOCKS, M], tl.float32)
        poison = tl.zeros([BLOCKS, M], tl.float32)
        for start in range(0, K, BLOCKS * M):
            v = selected(source, factors, start, K, n, WEIGHTED, BLOCKS, M)
            amax = tl.maximum(amax, tl.abs(v))
            poison += v - v
        step = _step(tl.max(tl.max(amax, 1), 0), tl.sum(tl.sum(poison, 1), 0))
        for start in range(0, K, BLOCKS * M):
            v = selected(source, factors, start, K, n, WEIGHTED, BLOCKS, M)
            tl.store(target + start + at, _round(v, step), mask=start + at < K)
    tl.store(token_scale + row, step)
