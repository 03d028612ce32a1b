"""The Triton kernels as TensorRT calls them: inputs first, then integers that are known when it runs, then outputs.

TensorRT passes a plugin's kernel nothing else: no floats, no pointers into a tensor, nothing behind the outputs. So
each entry hands its arguments to a kernel in that kernel's order, with everything else compiled in; Triton inlines it.
Imported where there is Triton only.
"""

# ruff: noqa: ANN001, ANN201, D103 (the arguments of Triton kernels are typed by Triton itself; each entry is its kernel)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ...kernels.block_sparse_attention_triton import attend_kernel
from ...kernels.fake_quantize_triton import _kernel as _fake_quantize
from ...kernels.int4_linear_triton import _gemm_kernel as _int4_product
from ...kernels.int4_weight_linear_triton import _gemm_kernel as _int4_weight_product
from ...kernels.int8_linear import _gemm_kernel as _int8_product
from ...kernels.int8_linear import _quantize_kernel as _quantize_tokens
from ...kernels.nm_int8_linear_triton import _select_kernel
from ...kernels.nm_sparsify_triton import _kernel as _nm_sparsify
from ...kernels.snap_tokens_triton import _snap_kernel
from ...kernels.token_grid_triton import _quantize_kernel as _grid_tokens

_jit: Callable[..., Any] = triton.jit


@_jit
def fake_quantize(
    x, M, y, K: tl.constexpr, CLIP: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    _fake_quantize(x, y, M, K, CLIP, LEVELS, ROWS, BLOCK)


@_jit
def nm_sparsify(
    x, factors, y, K: tl.constexpr, KEPT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr, OF: tl.constexpr
):
    _nm_sparsify(x, factors, y, K, KEPT, WEIGHTED, BLOCKS, OF)


@_jit
def quantize_tokens(x, K, quantized, step, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr):
    _quantize_tokens(x, quantized, step, K, BLOCK_K, ONE_BLOCK)


@_jit
def select_tokens(
    x, factors, quantized, step,
    K: tl.constexpr, KEPT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr, OF: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    _select_kernel(x, factors, quantized, step, K, KEPT, WEIGHTED, BLOCKS, OF, ONE_BLOCK)


@_jit
def int8_product(
    quantized, step, weight, scale, bias, M, N, K, y,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    FEW: tl.constexpr,
):  # fmt: skip
    _int8_product(quantized, step, weight, scale, bias, y, M, N, K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, FEW)


@_jit
def grid_tokens(
    x, K, quantized, step, shift,
    CLIP: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _grid_tokens(x, quantized, step, shift, CLIP, K, LEVELS, SHIFT, BLOCK_K)


@_jit
def int4_product(
    quantized, step, shift, weight, steps, scale, sums, bias, M, N, K, P, y,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _int4_product(
        quantized, step, shift, weight, steps, scale, sums, bias, y, M, N, K, P, HAS_BIAS, GROUP, BLOCK_M, HALF, BLOCK_K
    )


@_jit
def int4_weight_product(
    x, weight, steps, scale, bias, M, N, K, P, y,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _int4_weight_product(x, weight, steps, scale, bias, y, M, N, K, P, HAS_BIAS, GROUP, BLOCK_M, HALF, BLOCK_K)


@_jit
def attend(
    query, key, value, counts, blocks, pattern, key_bias,
    H, GROUP, R, Q, KEY_PLACES, N, M, LISTED, PATTERN_B, BIAS_B, BIAS_H,
    output, lse,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_PATTERN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    attend_kernel(
        query, key, value, counts, blocks, pattern, counts, counts, key_bias, counts, output, lse, SCALE,
        H, GROUP, R, Q, KEY_PLACES, N, M,
        H * N * D, N * D, D, H // GROUP * M * D, M * D, H // GROUP * M * D, M * D, H * N * D, N * D, D,
        N, Q, Q * LISTED, LISTED, PATTERN_B, 0, 0, BIAS_B, BIAS_H, D, D,
        D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_SIZE, False, HAS_PATTERN, False, HAS_BIAS, HAS_LSE, False, WHOLE,
    )  # fmt: skip


@_jit
def snap_tokens(
    x, theta, groups, factors, H, N, FRAMES, HEIGHT, WIDTH, FIRST, out, counts,
    D: tl.constexpr, ALONG_T: tl.constexpr, ALONG_H: tl.constexpr, ALONG_W: tl.constexpr, WINDOW: tl.constexpr,
    SHARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = H * 0 + D
    _snap_kernel(
        x, theta, groups, factors, out, counts, H, N, FRAMES, HEIGHT, WIDTH, FIRST, H * N * D, N * D, row, D,
        ALONG_T, ALONG_H, ALONG_W, WINDOW, SHARED, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@_jit
def token_roots(
    x, theta, groups, factors, H, N, FRAMES, HEIGHT, WIDTH, FIRST, out,
    D: tl.constexpr, ALONG_T: tl.constexpr, ALONG_H: tl.constexpr, ALONG_W: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = H * 0 + D
    _snap_kernel(
        x, theta, groups, factors, out, out, H, N, FRAMES, HEIGHT, WIDTH, FIRST, H * N * D, N * D, row, D,
        ALONG_T, ALONG_H, ALONG_W, WINDOW, 1, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
