"""The Triton kernel of `int4_weight_linear`: weights are widened to the activations' dtype in registers.

Imported where there is Triton only.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .int4_linear_triton import choose_config, tile_of

# As in `int4_linear_triton`: M = 1 is not compiled for itself.
_jit_any_m: Callable[..., Any] = triton.jit(do_not_specialize=["M"])


def launch(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run the Triton kernel, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = tokens.shape, len(scale)
    y = x.new_empty(m, n)
    if m > 0:
        group = k // len(steps)
        config = choose_config(m, n, group)
        half, block_k = 32, min(config.block_k, 64)
        grid = (triton.cdiv(m, min(config.block_m, 64)) * triton.cdiv(steps.shape[1], 2 * half),)
        _gemm_kernel[grid](
            tokens, weight, steps, scale, scale if bias is None else bias.contiguous(), y, m, n, k, steps.shape[1],
            HAS_BIAS=bias is not None, GROUP=group,
            BLOCK_M=min(config.block_m, 64), HALF=half, BLOCK_K=block_k, num_warps=4, num_stages=config.num_stages,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n)


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
