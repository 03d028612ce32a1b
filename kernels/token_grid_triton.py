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
    made = quantized, step, torch.empty_like(step, dtype=torch.int32)
    levels = {"LEVELS": 2**bits - 1, "SHIFT": 128 if bits == 8 else 0}
    if hadamard and rotation.orders(k).blocks == 1 and rotation.tile_fits(k, tokens.element_size()):
        chosen = rotation.split(k)
        _rotate_kernel[(triton.cdiv(m, rotation.ROWS),)](
            tokens, *made, *rotation.sides(k, tokens.device), k**-0.5, clip, m, **levels,
            LEFT=chosen.left, RIGHT=chosen.right, PADDED_LEFT=chosen.padded_left, PADDED_RIGHT=chosen.padded_right,
            ROWS=rotation.ROWS, num_warps=rotation.warps_of(chosen), num_stages=2,
        )  # fmt: skip
        return made
    if hadamard:
        tokens = rotation.launch(tokens.float())
    block = triton.next_power_of_2(k)
    _quantize_kernel[(m,)](
        tokens, *made, clip, k, **levels, BLOCK_K=block, num_warps=8 if block <= 8192 else 16
    )  # fmt: skip
    return made


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
def _store_row(
    ratio, zero, step, at, inside, row, start, quantized, token_step, token_shift,
    LEVELS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The integers of a row of values over their step, the step, and what is to be added to each integer."""
    q = tl.minimum(tl.maximum(round_half_even(ratio) + zero, 0.0), LEVELS)
    shift = SHIFT if SHIFT > 0 else zero
    tl.store(quantized + start + at, (q - shift).to(tl.int8), mask=inside)
    tl.store(token_shift + row, (shift - zero).to(tl.int32))
    tl.store(token_step + row, step)


@_jit
def _quantize_kernel(
    x, quantized, token_step, token_shift, clip, K, LEVELS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program a row, which stays in registers: its extremes, then its integers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_K)
    v = tl.load(x + row * K + at, mask=at < K, other=0.0).to(tl.float32)
    step, zero = step_and_zero(tl.min(v, 0), tl.max(v, 0), tl.sum(v - v, 0), clip, LEVELS)
    ratio = tl.div_rn(v, step)
    _store_row(ratio, zero, step, at, at < K, row, row * K, quantized, token_step, token_shift, LEVELS, SHIFT)


@_jit
def _rotate_kernel(
    x, quantized, token_step, token_shift, left, right, factor, clip, count,
    LEVELS: tl.constexpr, SHIFT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED_LEFT: tl.constexpr, PADDED_RIGHT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows a program, one after the other: each is rotated, then quantized."""
    i = tl.arange(0, PADDED_LEFT)
    j = tl.arange(0, PADDED_RIGHT)
    inside = (i < LEFT)[:, None] & (j < RIGHT)[None, :]
    at = i[:, None] * RIGHT + j[None, :]
    across, along = rotation.load_sides(x, left, right, PADDED_LEFT, PADDED_RIGHT)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, count)):
        start = row * (LEFT * RIGHT)
        tile = tl.load(x + start + at, mask=inside, other=0.0).to(across.dtype)
        v = rotation.rotate_tile(tile, across, along) * factor
        low, high = tl.min(tl.min(v, 1), 0), tl.max(tl.max(v, 1), 0)
        step, zero = step_and_zero(low, high, tl.sum(tl.sum(v - v, 1), 0), clip, LEVELS)
        # Rotated values are rounded sums: one more rounding, that of 1 / step, is no worse, and a product is faster.
        ratio = v * tl.div_rn(1.0, step)
        _store_row(ratio, zero, step, at, inside, row, start, quantized, token_step, token_shift, LEVELS, SHIFT)
