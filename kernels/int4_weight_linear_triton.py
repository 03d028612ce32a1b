"""The Triton kernels of `int4_weight_linear`: weights are widened to the activations' dtype in registers.

Few tokens wait for the weights: the inputs are split among programs, enough to keep a GPU's memory busy, a group's sum
is made of bare integers and takes its step at the end, and a second kernel adds the parts in order. Many tokens go
through tiles as in `int4_linear`.

Imported where there is Triton only.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int4_linear_triton import choose_config, tile_of

_jit: Callable[..., Any] = triton.jit
# As in `int4_linear_triton`: M = 1 is not compiled for itself.
_jit_any_m: Callable[..., Any] = triton.jit(do_not_specialize=["M"])

FEW = {2: 64, 4: 16}
"""Bytes of an activation -> tokens up to which the inputs are split among programs; more of float32 spill registers."""


def launch(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run the Triton kernels, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = tokens.shape, len(scale)
    y = x.new_empty(m, n)
    group = k // len(steps)
    if 0 < m <= FEW[x.element_size()]:
        few = choose_few(m, k, group, len(weight), x.element_size())
        part = torch.empty(few.splits, m, n, dtype=torch.float32, device=x.device)
        _few_kernel[(len(weight), few.splits)](
            tokens, weight, steps, part, m, n, k, steps.shape[1], triton.cdiv(k // few.block_k, few.splits),
            GROUP=group, BLOCK_M=few.block_m, BLOCK_K=few.block_k, num_warps=few.num_warps, num_stages=few.num_stages,
        )  # fmt: skip
        _join_kernel[(triton.cdiv(m * n, JOINED),)](
            part, scale, scale if bias is None else bias.contiguous(), y, m * n, n,
            SPLITS=few.splits, HAS_BIAS=bias is not None, BLOCK=JOINED,
        )  # fmt: skip
    elif m > 0:
        config = choose_config(m, n, group)
        half, block_k = 32, min(config.block_k, 64)
        grid = (triton.cdiv(m, min(config.block_m, 64)) * triton.cdiv(steps.shape[1], 2 * half),)
        _gemm_kernel[grid](
            tokens, weight, steps, scale, scale if bias is None else bias.contiguous(), y, m, n, k, steps.shape[1],
            HAS_BIAS=bias is not None, GROUP=group,
            BLOCK_M=min(config.block_m, 64), HALF=half, BLOCK_K=block_k, num_warps=4, num_stages=config.num_stages,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n)


class Few(NamedTuple):
    """How few tokens are multiplied: parts of the inputs, and a program's tile and launch options."""

    splits: int
    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


JOINED = 256
"""Outputs of a program that adds parts."""


def choose_few(m: int, k: int, group: int, blocks: int, item_size: int) -> Few:
    """For m tokens: many programs, which wait for memory together, but four tiles of inputs for each.

    On an H100, 4096 -> 4096 and 4096 -> 14336, microseconds: 1 token 9.6 and 22.1 (bfloat16 weights 17.1 and 43.0), 16
    tokens 9.9 and 22.9, 64 tokens 15.9 and 43.4. Of 13 others tried, with 1 to 8 warps, tiles of 64, and 264 to 2112
    programs, the worst took half as long again.
    """
    if m <= 16:
        block_k = min(group, 128 if item_size == 2 else 64)
        return Few(max(1, min(1056 // blocks, k // block_k // 4)), 16, block_k, 2 if item_size == 2 else 4, 4)
    block_k = min(group, 128)
    return Few(max(1, min(528 // blocks, k // block_k // 4)), max(16, 1 << (m - 1).bit_length()), block_k, 4, 3)


@_jit
def _whole(codes, dtype: tl.constexpr):
    """Codes 0..15 as whole numbers -8..7: below the bits of 128 or of 1024, whose last ones they are, and less that."""
    if dtype == tl.bfloat16:
        whole = (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    elif dtype == tl.float16:
        whole = (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    else:
        whole = codes.to(tl.float32) - 8.0
    return whole.to(dtype)


@_jit_any_m
def _few_kernel(
    x, weight, steps, part, M, N, K, P, tiles,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """64 channels and some tiles of the inputs a program; what it finds is its part of the sum, without the scale."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, 32)
    ks = tl.arange(0, BLOCK_K)
    first = split * tiles * BLOCK_K
    left = x + rows[:, None] * K + first + ks[None, :]
    right = weight + block.to(tl.int64) * K * 32 + (first + ks)[:, None] * 32 + lane[None, :]
    low = block * 64 + lane
    total_low = tl.zeros([BLOCK_M, 32], tl.float32)
    total_high = tl.zeros([BLOCK_M, 32], tl.float32)
    for start in range(first, tl.minimum(first + tiles * BLOCK_K, K), BLOCK_K):
        a = tl.load(left, mask=(rows < M)[:, None], other=0.0)
        pair = tl.load(right)
        group = steps + start // GROUP * P + low
        step_low, step_high = tl.load(group).to(tl.float32), tl.load(group + 32).to(tl.float32)
        total_low += tl.dot(a, _whole(pair & 15, a.dtype), input_precision="ieee") * step_low[None, :]
        total_high += tl.dot(a, _whole(pair >> 4, a.dtype), input_precision="ieee") * step_high[None, :]
        left += BLOCK_K
        right += BLOCK_K * 32
    out = part + (split * M + rows)[:, None] * N + low[None, :]
    inside = (rows < M)[:, None]
    tl.store(out, total_low, mask=inside & (low < N)[None, :])
    tl.store(out + 32, total_high, mask=inside & (low + 32 < N)[None, :])


@_jit
def _join_kernel(part, scale, bias, y, size, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Some outputs a program: their parts in order, then scale and bias."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(part + split * size + at, mask=inside, other=0.0)
    total *= tl.load(scale + at % N, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@_jit_any_m
def _gemm_kernel(
    x, weight, steps, scale, bias, y, M, N, K, P,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y a program, as in `int4_linear`, on weights widened to x's dtype in registers."""
    rows, _, low, high, left, right = tile_of(x, weight, M, K, P, BLOCK_M, HALF, BLOCK_K)
    total_low = tl.zeros([BLOCK_M, HALF], tl.float32)
    total_high = tl.zeros([BLOCK_M, HALF], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(left)
        pair = tl.load(right)
        group = steps + start // GROUP * P
        b = (((pair & 15).to(tl.int8) - 8) * tl.load(group + low)[None, :]).to(a.dtype)
        total_low = tl.dot(a, b, total_low, input_precision="ieee")
        b = (((pair >> 4).to(tl.int8) - 8) * tl.load(group + high)[None, :]).to(a.dtype)
        total_high = tl.dot(a, b, total_high, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K * 32
    inside = (rows < M)[:, None]
    for_low = low < N
    for_high = high < N
    first = total_low * tl.load(scale + low, mask=for_low, other=0.0)[None, :]
    second = total_high * tl.load(scale + high, mask=for_high, other=0.0)[None, :]
    if HAS_BIAS:
        first += tl.load(bias + low, mask=for_low, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias + high, mask=for_high, other=0.0).to(tl.float32)[None, :]
    start_of_row = y + rows.to(tl.int64)[:, None] * N
    tl.store(start_of_row + low[None, :], first.to(y.dtype.element_ty), mask=inside & for_low[None, :])
    tl.store(start_of_row + high[None, :], second.to(y.dtype.element_ty), mask=inside & for_high[None, :])
