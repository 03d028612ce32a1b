"""Selection and int8 product in one operator: the CPU, the interpreted and compiled Triton kernels, and refusals."""

from __future__ import annotations

import pytest
import torch

from graphwright.errors import InvalidArgument
from graphwright.kernels.contract import FLOATS
from graphwright.kernels.nm_int8_linear import nm_int8_linear, reference
from graphwright.kernels.nm_int8_linear_triton import LONGEST, warps_of
from graphwright.kernels.nm_sparsify import BLOCKS, nm_sparsify

from .aot import Request, compile_kernels
from .interpreter import Call, interpret
from .oracle import assert_within_rounding, make_case

LAUNCH = "graphwright.kernels.nm_int8_linear_triton:launch"


def case(tokens: int, k: int, n: int, m: int, dtype: torch.dtype = torch.float32, weighted: bool = True) -> tuple:
    x, weight, scale, bias = make_case(tokens, k, n, dtype=dtype, bias=True)
    factors = torch.rand(k, generator=torch.Generator().manual_seed(k)) + 0.5 if weighted else None
    return x, factors, weight, scale, bias, m // 2, m


def assert_right(y: torch.Tensor, made: tuple) -> None:
    x, factors, weight, scale, bias, n, m = made
    assert_within_rounding(y, nm_sparsify(x, factors, n, m), weight, scale, bias)


@pytest.mark.parametrize("m", BLOCKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_kernel_and_reference_agree_with_the_exact_sum(m, dtype):
    for tokens, weighted in ((0, True), (1, True), (33, False)):
        made = case(tokens, 96, 20, m, dtype, weighted)
        assert_right(nm_int8_linear(*made), made)
        assert_right(reference(*made), made)


def test_interpreted_kernels():
    """One tile and two passes, odd numbers of blocks, no tokens, rows without a scale."""
    cases = [case(3, 96, 9, m, dtype) for m in BLOCKS for dtype in (torch.float32, torch.float16)]
    cases += [case(2, LONGEST + 32, 5, 16), case(0, 32, 5, 8)]
    broken = case(4, 64, 6, 8)
    broken[0][1, 3], broken[0][2, 0], broken[0][3] = float("nan"), float("inf"), 0
    *results, last = interpret([Call(LAUNCH, made) for made in (*cases, broken)])
    for y, made in zip(results, cases, strict=True):
        assert_right(y, made)
    assert last[1:3].isnan().all()
    assert torch.equal(last[3], broken[4])


def test_compiles_within_the_limits_of_each_device():
    requests = [
        Request(
            "graphwright.kernels.nm_int8_linear_triton:_select_kernel",
            {"x": kind, "factors": "*fp32", "quantized": "*i8", "token_scale": "*fp32", "K": "i32", "n": "i32"},
            {"WEIGHTED": True, "BLOCKS": block // m, "M": m, "ONE_BLOCK": one},
            sm,
            warps_of(block),
            aligned=("K",),
        )
        for sm, m, block, kind, one in (
            (80, 16, 2048, "*bf16", True),
            (89, 16, 1024, "*fp32", True),
            (90, 4, 2048, "*bf16", True),
            (90, 32, 2048, "*bf16", True),
            (90, 16, LONGEST, "*bf16", True),
            (90, 16, LONGEST, "*bf16", False),
        )
    ]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: torch.ones(3, 18)}, "got K=18|got x of shape|got factors of shape"),
        ({1: torch.ones(5)}, r"got factors of shape \[5\]"),
        ({2: torch.ones(4, 16)}, "got weight of torch.float32"),
        ({5: 9}, "got n=9 of m=8"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses(change, reason, device):
    made = list(case(3, 16, 4, 8))
    for position, value in change.items():
        made[position] = value
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in made]
    with pytest.raises(InvalidArgument, match=reason):
        nm_int8_linear(*moved)


def test_opcheck():
    torch.library.opcheck(nm_int8_linear, case(5, 32, 6, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_the_gpu(dtype):
    for made in (case(70, 1536, 64, 16, dtype), case(3, LONGEST + 64, 64, 8, dtype, weighted=False)):
        on_device = [value.cuda() if isinstance(value, torch.Tensor) else value for value in made]
        assert_right(nm_int8_linear(*on_device).cpu(), made)
