"""The Triton kernel: its values in the interpreter, what it compiles to, and, where there is one, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graphwright.kernels.contract import FLOATS
from graphwright.kernels.snap_tokens import reference, roots_reference, snap_tokens, token_roots
from graphwright.kernels.snap_tokens_triton import block_tokens

from .aot import Request, compile_kernels
from .interpreter import Call, interpret
from .test_snap_tokens import FACTORS, GROUPS, make_case

# Grid, first, text: windows that do not fit, several programs a head, an image, no text.
GRIDS = [((5, 6, 7), 3, 5), ((4, 4, 4), 0, 0), ((1, 3, 5), 1, 1), ((3, 2, 1), 2, 2)]
KINDS = [("element", 2, [0, 1, 2]), ("group", 2, [0, 1, 2]), ("token", 2, [0, 1, 2]), ("element", 4, [0, 2]),
         ("group", 3, [1])]  # fmt: skip


def cases(dtypes=(torch.float32, torch.float16)):
    for number, (grid, first, text) in enumerate(GRIDS):
        for granularity, window, axes in KINDS:
            dtype = dtypes[number % len(dtypes)]
            theta = float("inf") if number == 3 else 0.6
            x, limit, sizes = make_case(grid, first, text, theta=theta, dtype=dtype, seed=number, batch=1)
            factors = [1.0] * 3 if granularity == "token" else FACTORS
            # 0 leaves and not 0 * inf: the groups' factors are all positive.
            yield (x, limit, GROUPS, factors), {**sizes, "axes": axes, "window": window, "granularity": granularity}


def test_interpreted_kernel_agrees_with_the_formula():
    made = list(cases())
    calls = [
        Call(
            "graphwright.kernels.snap_tokens_triton:launch",
            (*given, (o["frames"], o["height"], o["width"]), o["first"], o["axes"], o["window"], o["granularity"]),
        )
        for given, o in made
    ]
    for found, (given, options) in zip(interpret(calls), made, strict=True):
        for got, wanted in zip(found, reference(*given, **options), strict=True):
            assert torch.equal(got, wanted), options


def test_interpreted_roots_strides_and_nothing():
    x, theta, sizes = make_case((3, 4, 5))
    grid = (3, 4, 5)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    launch = "graphwright.kernels.snap_tokens_triton:launch_roots"
    calls = [
        Call(launch, (x, theta, grid, 3, [0, 1, 2], 2)),
        Call(launch, (apart, theta, grid, 3, [0, 1, 2], 2)),
        Call(launch, (x.mT.contiguous().mT, theta, grid, 3, [0, 1, 2], 2)),
        Call(launch, (x[:, :0], theta, grid, 3, [0], 2)),
    ]
    expected = roots_reference(x, theta, **sizes, axes=[0, 1, 2], window=2)
    *found, nothing = interpret(calls)
    assert all(torch.equal(got, expected) for got in found)
    assert nothing.shape == (2, 0, 65)


def test_configurations_compile_within_the_limits_of_each_device():
    requests = [_request(80, 256, "fp32", 0, 2), _request(89, 128, "bf16", 3, 2), _request(90, 128, "fp16", 1, 4)]
    requests.append(_request(90, 64, "bf16", 1, 2, roots=True))
    # Sizes of one are constants to Triton.
    flat = _request(90, 64, "fp32", 0, 2)
    kinds = {name: kind for name, kind in flat.signature.items() if name != "width"}
    requests.append(replace(flat, signature=kinds, constants={**flat.constants, "width": 1}))
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)


def _request(sm: int, channels: int, kind: str, shared: int, window: int, roots: bool = False) -> Request:
    strides = ("x_b", "x_h", "x_n")
    pointers = {"x": f"*{kind}", "theta": "*fp32", "groups": "*i32", "factors": "*fp32"}
    pointers |= {"out": "*i32" if roots else f"*{kind}", "counts": "*i32"}
    sizes = ("H", "N", "frames", "height", "width", "first", *strides)
    return Request(
        "graphwright.kernels.snap_tokens_triton:_snap_kernel",
        {**pointers, **dict.fromkeys(sizes, "i32")},
        {
            "D": channels, "ALONG_T": True, "ALONG_H": True, "ALONG_W": True, "WINDOW": window, "SHARED": shared,
            "ROOTS": roots, "BLOCK_N": block_tokens(channels), "BLOCK_D": channels,
        },
        sm,
        aligned=strides,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    for (x, theta, *rest), options in cases(FLOATS):
        found = snap_tokens(x.cuda(), theta.cuda(), *rest, **options)
        for got, wanted in zip(found, reference(x, theta, *rest, **options), strict=True):
            assert torch.equal(got.cpu(), wanted)
        if options.pop("granularity") == "token":
            assert torch.equal(
                token_roots(x.cuda(), theta.cuda(), **options).cpu(), roots_reference(x, theta, **options)
            )
