"""The Triton kernel of `int4_linear`: weights become 8 bits in registers, products run on int8 tensor cores.

Imported where there is Triton only.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (what Triton kernels take and give are pointers and tiles that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .int4_weights import Int4
from .token_grid_triton import launch_quantize

_jit: Callable[..., Any] = triton.jit
# Triton would compile M = 1 with all rows of a tile at one address, which it loads without pipelining.
_jit_any_m: Callable[..., Any] = triton.jit(do_not_specialize=["M"])


def launch(
    x: Tensor, weight: Int4, bias: Tensor | None = None, bits: int = 8, clip: float = 1.0, hadamard: bool = False
) -> Tensor:
    """Run the two Triton kernels, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = tokens.shape, len(weight.scale)
    y = x.new_empty(m, n)
    if m > 0:
        quantized, step, shift = launch_quantize(tokens, bits, clip, hadamard)
        group = k // len(weight.steps)
        config = choose_config(m, n, group)
        grid = (triton.cdiv(m, config.block_m) * triton.cdiv(weight.steps.shape[1], 2 * config.half),)
        _gemm_kernel[grid](
            quantized, step, shift, *weight, weight.scale if bias is None else bias.contiguous(), y,
            m, n, k, weight.steps.shape[1],
            HAS_BIAS=bias is not None, GROUP=group,
            BLOCK_M=config.block_m, HALF=config.half, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n)


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch of the GEMM kernel; ``half`` low and ``half`` high channels a tile."""

    block_m: int
    half: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_config(m: int, n: int, group: int) -> Config:
    """Tile sizes for m tokens: small tiles for few, since such products wait for memory, and no tile crosses a group.

    Not tuned on a GPU, where it was checked; they compile without spills for sm_80, sm_89 and sm_90.
    """
    block_k = min(group, 128)
    if m <= 16:
        return Config(16, 32, block_k, 4, 4)
    if m * n <= 1 << 20:
        return Config(64, 32, block_k, 4, 3)
    return Config(128, 64, min(group, 64), 8, 3)


@_jit_any_m
def _gemm_kernel(
    quantized, token_step, token_shift, weight, steps, scale, sums, bias, y, M, N, K, P,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y a program: HALF channels from the low nibbles, and the HALF that lie 32 further from the high."""
    rows, packed, low, high, left, right = tile_of(quantized, weight, M, K, P, BLOCK_M, HALF, BLOCK_K)
    total_low = tl.zeros([BLOCK_M, HALF], tl.int32)
    total_high = tl.zeros([BLOCK_M, HALF], tl.int32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(left)
        pair = tl.load(right)
        group = steps + start // GROUP * P
        b = ((pair & 15).to(tl.int8) - 8) * tl.load(group + low)[None, :]
        total_low = tl.dot(a, b, total_low, out_dtype=tl.int32)
        b = ((pair >> 4).to(tl.int8) - 8) * tl.load(group + high)[None, :]
        total_high = tl.dot(a, b, total_high, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K * 32
    step = tl.load(token_step + rows % M)
    shift = tl.load(token_shift + rows % M)
    _store_tile(total_low, step, shift, scale, sums, bias, y, rows, low, packed < P // 2, M, N, HAS_BIAS)
    _store_tile(total_high, step, shift, scale, sums, bias, y, rows, high, packed < P // 2, M, N, HAS_BIAS)


@_jit
def tile_of(x, weight, M, K, P, BLOCK_M: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program's tile: its rows, packed, low and high channels, and where its first tiles of x and weight lie."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(P, 2 * HALF)
    rows = program // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    packed = program % tiles_n * HALF + tl.arange(0, HALF)
    # Padded channels are zeros; tiles past the end wrap around and are not stored.
    low = (packed // 32 * 64 + packed % 32) % P
    high = low + 32
    ks = tl.arange(0, BLOCK_K)
    left = x + (rows % M).to(tl.int64)[:, None] * K + ks[None, :]
    right = weight + (low // 64).to(tl.int64)[None, :] * K * 32 + ks[:, None] * 32 + (packed % 32)[None, :]
    return rows, packed, low, high, left, right


@_jit
def _store_tile(total, step, shift, scale, sums, bias, y, rows, columns, inside, M, N, HAS_BIAS: tl.constexpr):
    inside = inside & (columns < N)
    total += shift[:, None] * tl.load(sums + columns, mask=inside, other=0)[None, :]
    result = total.to(tl.float32) * tl.load(scale + columns, mask=inside, other=0.0)[None, :] * step[:, None]
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    pointers = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(pointers, result.to(y.dtype.element_ty), mask=(rows < M)[:, None] & inside[None, :])
