"""The Triton kernels: their numbers in the interpreter, what they compile to, and, where there is one, on a GPU."""

from __future__ import annotations

import pytest
import torch

from graphwright.kernels.contract import FLOATS
from graphwright.kernels.int8_linear import Config, choose_config, int8_linear

from .aot import Request, compile_kernels
from .interpreter import Call, interpret
from .oracle import assert_within_rounding, make_case

# Tokens, inputs, outputs: every branch of choose_config, and the edges of its tiles.
SIZES = [(1, 1, 1), (1, 576, 40), (17, 128, 33), (33, 272, 17), (20, 5000, 9), (70, 301, 65), (130, 144, 130)]
LARGE = [(512, 576, 1536), (512, 4096, 4096), (2048, 2048, 2048)]
INT8_PRODUCT = {80: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", 90: "wgmma.mma_async.sync.aligned"}


def test_interpreted_kernels_agree_with_the_exact_sum():
    cases = [
        make_case(*sizes, dtype=dtype, bias=bias)
        for sizes in SIZES
        for dtype, bias in ((torch.float32, True), (torch.float16, False))
    ]
    calls = [Call("graphwright.kernels.int8_linear:launch", case) for case in cases]
    for y, case in zip(interpret(calls), cases, strict=True):
        assert_within_rounding(y, *case)


def test_interpreted_kernels_at_the_edges():
    """Zeros give the bias, NaN and infinity rows of NaN, subnormals no division by zero, for one block of K and two."""
    cases = [_edges(k) for k in (40, 4100)]
    empty = (torch.empty(2, 0, 40), *cases[0][1:])
    *results, nothing = interpret([Call("graphwright.kernels.int8_linear:launch", case) for case in (*cases, empty)])
    assert nothing.shape == (2, 0, 24)
    for y, case in zip(results, cases, strict=True):
        _assert_edges(y, case)


def _edges(k: int) -> tuple[torch.Tensor, ...]:
    x, *rest = make_case(20, k, 24, bias=True)
    x[0] = 0
    x[1] = 1e-45
    x[2, 3] = float("nan")
    x[3, k - 1] = float("inf")
    return x, *rest


def _assert_edges(y: torch.Tensor, case: tuple[torch.Tensor, ...]) -> None:
    x, *rest = case
    assert torch.equal(y[0], rest[-1])
    assert y[2:4].isnan().all()
    finite = [row for row in range(len(x)) if row not in (2, 3)]
    assert_within_rounding(y[finite], x[finite], *rest)


def test_configurations_compile_within_the_limits_of_each_device():
    """All of them for sm_90; for its elders, whose code is alike, the tiles that need most."""
    chosen = sorted({(choose_config(m, n, k), k % 16 == 0) for m, k, n in SIZES + LARGE}, key=str)
    assert len(chosen) == 7
    largest = [choice for choice in chosen if not choice[1] or choice[0].block_n == 128]
    gemms = [_gemm(90, *choice) for choice in chosen] + [_gemm(sm, *choice) for sm in (80, 89) for choice in largest]
    requests = [*gemms, *(_quantize(sm, one_block) for sm in (80, 90) for one_block in (True, False))]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)
        if request in gemms:
            # wgmma multiplies 64 rows at least: smaller tiles use the instruction of sm_80 on sm_90, too.
            product = INT8_PRODUCT[90 if request.sm == 90 and request.constants["BLOCK_M"] >= 64 else 80]
            lines = [line for line in made.ptx.splitlines() if product in line]
            assert lines, request
            assert all(".s32.s8.s8" in line for line in lines)


def _gemm(sm: int, config: Config, aligned: bool) -> Request:
    pointers = {"quantized": "*i8", "token_scale": "*fp32", "weight": "*i8", "scale": "*fp32", "bias": "*bf16"}
    return Request(
        "graphwright.kernels.int8_linear:_gemm_kernel",
        {**pointers, "y": "*bf16", "M": "i32", "N": "i32", "K": "i32"},
        {
            "HAS_BIAS": True,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "EVEN_K": False,
            "FEW": config.block_m <= 16,
        },
        sm,
        config.num_warps,
        config.num_stages,
        aligned=("K", "N") if aligned else (),
    )


def _quantize(sm: int, one_block: bool) -> Request:
    signature = {"x": "*fp32", "quantized": "*i8", "token_scale": "*fp32", "K": "i32"}
    constants = {"BLOCK_K": 4096, "ONE_BLOCK": one_block}
    return Request("graphwright.kernels.int8_linear:_quantize_kernel", signature, constants, sm)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", SIZES + LARGE, ids=str)
def test_on_the_gpu(dtype, sizes):
    case = make_case(*sizes, dtype=dtype, bias=True)
    assert_within_rounding(int8_linear(*(tensor.cuda() for tensor in case)).cpu(), *case)
    assert_within_rounding(int8_linear(*(tensor.cuda() for tensor in case[:3])).cpu(), *case[:3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_at_the_edges():
    for case in (_edges(40), _edges(4100)):
        _assert_edges(int8_linear(*(tensor.cuda() for tensor in case)).cpu(), case)
