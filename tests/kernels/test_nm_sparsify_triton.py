"""The Triton kernels of n:m sparsity: their numbers in the interpreter, what they compile to, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from graphwright.kernels.contract import FLOATS
from graphwright.kernels.nm_sparsify import BLOCKS, nm_sparsify, reference
from graphwright.kernels.nm_sparsify_triton import LENGTH, warps_of

from .aot import Request, compile_kernels
from .interpreter import Call, interpret


def cases(dtypes: tuple[torch.dtype, ...]) -> list[tuple]:
    """Odd numbers of blocks, ties, NaN and infinity, with and without factors."""
    made = []
    for m in BLOCKS:
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(m)
            x = torch.randn(7, 3 * m, generator=generator).to(dtype)
            x[1], x[2], x[3, 0], x[4, 1] = x[1].round(), 0, float("nan"), float("inf")
            made += [(x, torch.rand(3 * m, generator=generator), m // 2, m), (x, None, 1, m)]
    return made


def test_interpreted_kernel_keeps_what_the_reference_keeps():
    wanted = cases((torch.float32, torch.float16))
    wanted.append((torch.empty(2, 0, 16), None, 2, 4))
    for y, case in zip(
        interpret([Call("graphwright.kernels.nm_sparsify_triton:launch", case) for case in wanted]), wanted, strict=True
    ):
        assert torch.equal(y.nan_to_num(7.0), reference(*case).nan_to_num(7.0)), case[1:]


def test_compiles_within_the_limits_of_each_device():
    requests = [
        Request(
            "graphwright.kernels.nm_sparsify_triton:_kernel",
            {"x": kind, "factors": "*fp32", "y": kind, "K": "i32", "n": "i32"},
            {"WEIGHTED": True, "BLOCKS": LENGTH // m, "M": m},
            sm,
            num_warps=warps_of(LENGTH),
        )
        for sm, m, kind in [(80, 16, "*bf16"), (89, 32, "*fp32"), *((90, m, "*bf16") for m in BLOCKS)]
    ]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    for x, factors, n, m in cases(FLOATS):
        got = nm_sparsify(x.cuda(), None if factors is None else factors.cuda(), n, m).cpu()
        assert torch.equal(got.nan_to_num(7.0), reference(x, factors, n, m).nan_to_num(7.0))
