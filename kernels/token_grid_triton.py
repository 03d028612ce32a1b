"""The Triton kernel of `token_grid`: a program finds one row's grid and makes its integers, rotated first if asked for.

Imported where there is Triton only.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hadamard as rotation

_jit: Callable[..., Any] = triton.jit


def launch_quantize(tokens: Tensor, bits: int, clip: float, hadamard: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, K] as int8, their steps float32 [T] and what is to be added to each integer, int32 [T].

    A Hadamard transform is fused where one matrix covers the row and its tile fits; else it is a kernel of its own.
    """
    m, k = tokens.shape
    quantized = torch.empty_like(tokens, dtype=torch.int8)
    step = torch.empty(m, dtype=torch.float32, device=tokens.device)
    shift = torch.empty(m, dtype=torch.int32, device=tokens.device)
    chosen = rotation.split(k)
    fused = hadamard and rotation.orders(k).blocks == 1 and chosen.padded_left * chosen.padded_right <= _LARGEST_TILE
    if hadamard and not fused:
        tokens = rotation.launch(tokens.float())
    left, right = rotation.sides(k, tokens.device) if fused else (tokens, tokens)
    shape = chosen if fused else (1, 1, 1, 1)
    block = triton.next_power_of_2(k)
    _quantize_kernel[(m,)](
        tokens, quantized, step, shift, left, right, k**-0.5, clip, k,
        LEVELS=2**bits - 1, SHIFT=128 if bits == 8 else 0, ROTATE=fused,
        LEFT=shape[0], RIGHT=shape[1], PADDED_LEFT=shape[2], PADDED_RIGHT=shape[3], BLOCK_K=block,
        num_warps=8 if block <= 8192 else 16,
    )  # fmt: skip
    return quantized, step, shift


_LARGEST_TILE = 4096
"""Elements of a row's padded tile that are rotated in registers; beyond, the rotation is a kernel of its own."""


@_jit
def round_half_even(v):  # noqa: ANN201
    """Like torch.round for |v| < 2^22."""
    # Adding and subtracting 1.5 * 2^23 does it also in the interpreter, which has no libdevice.
    return (v + 12582912.0) - 12582912.0


@_jit
def step_and_zero(low, high, poison, clip, LEVELS: tl.constexpr):  # noqa: ANN201
    """Step and zero point of a row with these extremes; the step is NaN where ``poison`` (the sum of v - v) is."""
    low = tl.minimum(low, 0.0) * clip
    high = tl.maximum(high, 0.0) * clip
    step = tl.maximum((high - low) * (1.0 / LEVELS), 1.1754943508222875e-38)
    return step + poison, round_half_even(tl.div_rn(-low, step))


@_jit
def _quantize_kernel(
    x, quantized, token_step, token_shift, left, right, factor, clip, K,
    LEVELS: tl.constexpr, SHIFT: tl.constexpr, ROTATE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED_LEFT: tl.constexpr, PADDED_RIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a token: its rotation if asked for, its extremes, its integers; the row stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    if ROTATE:
        i = tl.arange(0, PADDED_LEFT)
        j = tl.arange(0, PADDED_RIGHT)
        inside = (i < LEFT)[:, None] & (j < RIGHT)[None, :]
        at = i[:, None] * RIGHT + j[None, :]
        tile = tl.load(x + row * K + at, mask=inside, other=0.0).to(tl.float32)
        v = rotation.rotate_tile(tile, left, right, factor, PADDED_LEFT, PADDED_RIGHT)
        low = tl.min(tl.min(v, 1), 0)
        high = tl.max(tl.max(v, 1), 0)
        poison = tl.sum(tl.sum(v - v, 1), 0)
    else:
        at = tl.arange(0, BLOCK_K)
        inside = at < K
        v = tl.load(x + row * K + at, mask=inside, other=0.0).to(tl.float32)
        low = tl.min(v, 0)
        high = tl.max(v, 0)
        poison = tl.sum(v - v, 0)
    step, zero = step_and_zero(low, high, poison, clip, LEVELS)
    q = tl.minimum(tl.maximum(round_half_even(tl.div_rn(v, step)) + zero, 0.0), LEVELS)
    if SHIFT:
        tl.store(quantized + row * K + at, (q - SHIFT).to(tl.int8), mask=inside)
        tl.store(token_shift + row, (SHIFT - zero).to(tl.int32))
    else:
        tl.store(quantized + row * K + at, (q - zero).to(tl.int8), mask=inside)
        tl.store(token_shift + row, 0)
    tl.store(token_step + row, step)
