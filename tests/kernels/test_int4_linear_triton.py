"""The Triton kernels of 4-bit linears and of fake quantization: numbers, instructions, limits, a GPU."""

from __future__ import annotations

import pytest
import torch

from graphwright.kernels.fake_quantize import fake_quantize
from graphwright.kernels.fake_quantize import reference as fake_reference
from graphwright.kernels.hadamard import ROWS, split, warps_of
from graphwright.kernels.int4_linear import int4_linear, reference
from graphwright.kernels.int4_linear_triton import choose_config
from graphwright.kernels.int4_weight_linear import int4_weight_linear
from graphwright.kernels.int4_weight_linear import reference as weight_reference
from graphwright.kernels.int4_weight_linear_triton import choose_few

from .aot import Request, compile_kernels
from .int4_oracle import assert_close_to_exact, make_int4_case
from .interpreter import Call, interpret

# Tokens, inputs, outputs: each branch of choose_config, odd numbers of channels, blocks that wrap around.
SIZES = [(1, 64, 1), (5, 192, 70), (33, 128, 130), (17, 576, 64)]
INT8_PRODUCT = ".s32.s8.s8.s32"


def test_interpreted_int4_linear():
    cases = [
        (make_int4_case(*sizes, group=group, dtype=dtype, bias=bias), bits, clip)
        for sizes in SIZES
        for group, dtype, bias, bits, clip in (
            (32, torch.float32, True, 8, 1.0),
            (64, torch.float16, False, 4, 0.9),
        )
    ]
    calls = [Call("int4_oracle:launch", (*case, bits, clip)) for case, bits, clip in cases]
    for y, (case, bits, clip) in zip(interpret(calls), cases, strict=True):
        assert_close_to_exact(y, case, bits, clip)


def test_interpreted_rotation_and_edges():
    rotated = make_int4_case(4, 192, 70, bias=True)
    edges = make_int4_case(6, 64, 9, bias=True)
    edges[0][0] = 0
    edges[0][1, 3] = float("nan")
    edges[0][2, 63] = float("inf")
    empty = (torch.empty(2, 0, 64), *edges[1:])
    launch = "int4_oracle:launch"
    y, edge, nothing = interpret(
        [Call(launch, (*rotated, 8, 1.0, True)), Call(launch, (*edges, 8)), Call(launch, (*empty, 8))]
    )
    expected = reference(*rotated, 8, 1.0, True)
    assert (y - expected).norm() <= 0.01 * expected.norm()
    assert torch.equal(edge[0], edges[-1])
    assert edge[1:3].isnan().all()
    assert edge[3:].isfinite().all()
    assert nothing.shape == (2, 0, 9)


def test_interpreted_weight_only_and_fake_quantize():
    cases = [make_int4_case(*sizes, group=32, dtype=dtype, bias=True) for sizes in SIZES for dtype in (torch.float32,)]
    calls = [
        Call("graphwright.kernels.int4_weight_linear_triton:launch", (x, packed, steps, scale, bias))
        for x, packed, steps, scale, _, bias in cases
    ]
    rows = torch.randn(3, 5, 96)
    rows[0, 0, 0] = float("nan")
    calls.append(Call("graphwright.kernels.fake_quantize_triton:launch", (rows, 4, 48)))
    *results, faked = interpret(calls)
    for y, (x, packed, steps, scale, _, bias) in zip(results, cases, strict=True):
        expected = weight_reference(x, packed, steps, scale, bias)
        # Sums of up to 576 terms in float32, in another order.
        assert torch.allclose(y, expected, rtol=0, atol=600 * 1.2e-7 * float(expected.abs().max()) * 10)
    assert torch.equal(faked, fake_reference(rows, 4, 48)) or torch.allclose(
        faked, fake_reference(rows, 4, 48), equal_nan=True, atol=1e-6
    )


def test_kernels_compile_within_the_limits_of_each_device():
    requests = []
    pointers = {"quantized": "*i8", "token_step": "*fp32", "token_shift": "*i32", "weight": "*u8", "steps": "*i8"}
    rest = {"scale": "*fp32", "sums": "*i32", "bias": "*bf16", "y": "*bf16", **dict.fromkeys("MNKP", "i32")}
    # sm_89, whose code is that of sm_80, has less shared memory: the largest tile must fit there.
    for sm, tokens in ((80, (1, 128, 4096)), (89, (4096,)), (90, (1, 4096))):
        for config in [choose_config(m, 1536, 64) for m in tokens]:
            tile = {"BLOCK_M": config.block_m, "HALF": config.half, "BLOCK_K": config.block_k}
            constants = {"HAS_BIAS": True, "GROUP": 64, **tile}
            kernel = "graphwright.kernels.int4_linear_triton:_gemm_kernel"
            launch = (config.num_warps, config.num_stages, ("K", "N", "P"))
            requests.append(Request(kernel, pointers | rest, constants, sm, *launch))
    gemms = len(requests)
    for sm in (80, 90):
        signature = {"x": "*bf16", "quantized": "*i8", "token_step": "*fp32", "token_shift": "*i32", "clip": "fp32"}
        kernel = "graphwright.kernels.token_grid_triton:_{}_kernel"
        levels = {"LEVELS": 255, "SHIFT": 128}
        sizes = {"K": "i32"}
        requests.append(Request(kernel.format("quantize"), signature | sizes, levels | {"BLOCK_K": 8192}, sm, 8))
        sides = {"left": "*i8", "right": "*i8", "factor": "fp32", "count": "i32"}
        for n in (1536,) if sm == 80 else (576, 1536, 4096):
            names = ("LEFT", "RIGHT", "PADDED_LEFT", "PADDED_RIGHT")
            shape = {**dict(zip(names, split(n), strict=True)), "ROWS": ROWS}
            constants, warps = levels | shape, warps_of(split(n))
            requests.append(Request(kernel.format("rotate"), signature | sides, constants, sm, warps, num_stages=2))
        constants = {"HAS_BIAS": True, "GROUP": 64, "BLOCK_M": 64, "HALF": 32, "BLOCK_K": 64}
        signature = {"x": "*bf16", "weight": "*u8", "steps": "*i8", "scale": "*fp32", "bias": "*bf16", "y": "*bf16"}
        signature |= dict.fromkeys("MNKP", "i32")
        kernel = "graphwright.kernels.int4_weight_linear_triton:_{}_kernel"
        requests.append(Request(kernel.format("gemm"), signature, constants, sm, aligned=("K", "N", "P")))
        for m, item_size in ((1, 2), (40, 2), (16, 4)):
            few = choose_few(m, 4096, 128, 64, item_size)
            constants = {"GROUP": 128, "BLOCK_M": few.block_m, "BLOCK_K": few.block_k}
            kinds = {"x": {2: "*bf16", 4: "*fp32"}[item_size], "weight": "*u8", "steps": "*i8", "part": "*fp32"}
            kinds |= dict.fromkeys(("M", "N", "K", "P", "tiles"), "i32")
            launch = (few.num_warps, few.num_stages, ("K", "N", "P"))
            requests.append(Request(kernel.format("few"), kinds, constants, sm, *launch))
        constants = {"LEVELS": 15, "ROWS": 16, "BLOCK": 64}
        signature = {"x": "*bf16", "y": "*bf16", "M": "i32", "K": "i32", "clip": "fp32"}
        requests.append(Request("graphwright.kernels.fake_quantize_triton:_kernel", signature, constants, sm))
    for position, (made, request) in enumerate(zip(compile_kernels(requests), requests, strict=True)):
        assert made.fits(request.sm), (request, made)
        if position < gemms:
            products = [line for line in made.ptx.splitlines() if "mma" in line and ".s8" in line]
            assert products, request


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [*SIZES, (512, 576, 1536), (300, 1536, 576)], ids=str)
def test_on_the_gpu(sizes, bits):
    case = make_int4_case(*sizes, bias=True)
    on_device = [tensor.cuda() for tensor in case]
    assert_close_to_exact(int4_linear(*on_device, bits).cpu(), case, bits, 1.0)
    if sizes[1] in (192, 576, 1536):
        expected = reference(*case, bits, 1.0, True)
        assert (int4_linear(*on_device, bits, 1.0, True).cpu() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.gpu
@GPU
def test_the_others_on_the_gpu():
    x, packed, steps, scale, _, bias = (tensor.cuda() for tensor in make_int4_case(40, 576, 192, bias=True))
    y, expected = (f(x, packed, steps, scale, bias) for f in (int4_weight_linear, weight_reference))
    assert torch.allclose(y, expected, atol=1e-2)
    rows = torch.randn(7, 128, device="cuda")
    assert torch.allclose(fake_quantize(rows, 4, 64), fake_reference(rows, 4, 64), atol=1e-5)
