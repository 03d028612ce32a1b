"""The Triton kernel: its numbers in the interpreter, what it compiles to, and, where there is one, on a GPU."""

from __future__ import annotations

import pytest
import torch

from graphwright.kernels.contract import FLOATS
from graphwright.kernels.tile_mass import choose_config, tile_mass

from .aot import Request, compile_kernels
from .interpreter import Call, interpret
from .test_tile_mass import assert_within_rounding, make_case

# Partial tiles on every axis, tiles of more and of less than a block of either side, text before and behind the video.
CASES = [
    {"grid": (3, 3, 4), "tile": (2, 2, 3), "protected": 5, "first": 2, "stride": 2, "batch": 2},
    {"grid": (2, 9, 10), "tile": (1, 8, 9), "protected": 40, "head_dim": 40, "heads": 1, "stride": 3},
    {"grid": (3, 8, 8), "tile": (2, 8, 8), "heads": 1, "head_dim": 64, "stride": 3},
    {"grid": (1, 1, 1), "tile": (4, 4, 4), "head_dim": 3},
]


def test_interpreted_kernel_agrees_with_the_exact_masses():
    made = [make_case(**case, dtype=dtype) for case in CASES for dtype in (torch.float32, torch.float16)]
    results = interpret([Call("graphwright.kernels.tile_mass:launch", *case) for case in made])
    for result, case in zip(results, made, strict=True):
        assert_within_rounding(result, *case)


def test_interpreted_kernel_at_the_edges():
    """Strides, a scale of its own, foreign tokens, no heads, and only padding."""
    (query, key, order), sizes = make_case((2, 3, 4), (2, 2, 3), protected=3, batch=2)
    apart = query.transpose(1, 2).contiguous().transpose(1, 2), key.mT.contiguous().mT, order
    foreign = torch.where(order < 0, 1000, order)
    strided, other, nobody, padding = interpret(
        [
            Call("graphwright.kernels.tile_mass:launch", apart, {**sizes, "scale": 0.4}),
            Call("graphwright.kernels.tile_mass:launch", (query, key, foreign), sizes),
            Call("graphwright.kernels.tile_mass:launch", (query[:, :0], key[:, :0], order), sizes),
            Call("graphwright.kernels.tile_mass:launch", (query, key, torch.full_like(order, -1)), sizes),
        ]
    )
    assert_within_rounding(strided, (query, key, order), sizes, 0.4)
    assert_within_rounding(other, (query, key, order), sizes)
    assert (nobody[0].shape, nobody[1].shape) == ((2, 0, 1, 2, 2), (2, 0))
    assert all((table == 0).all() for table in padding)


def test_interpreted_kernel_with_fewer_programs_than_tiles():
    args, sizes = make_case((3, 3, 4), (2, 2, 3), protected=5)
    (result,) = interpret([Call("graphwright.kernels.tile_mass:launch", args, {**sizes, "programs": 5})])
    assert_within_rounding(result, args, sizes)


def test_configurations_compile_within_the_limits_of_each_device():
    requests = [_request(sm, head_dim, "bf16", 2) for sm in (80, 89, 90) for head_dim in (64, 128)]
    requests += [_request(89, 256, "bf16", 2), _request(89, 64, "fp32", 4), _request(89, 256, "fp32", 4)]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)
        if request.signature["query"] == "*bf16":
            assert ("wgmma" if request.sm == 90 else "mma.sync") in made.ptx


def _request(sm: int, head_dim: int, kind: str, item_size: int) -> Request:
    config = choose_config(head_dim, item_size, 128)
    strides = tuple(f"{name}_{axis}" for name in ("query", "key") for axis in "bhn")
    counts = ("H", "N", "P", "tiles", "tiles_h", "tiles_w", "volume", "stride", "programs", "begin")
    signature = {"query": f"*{kind}", "key": f"*{kind}", "order": "*i32", "tables": "*fp32", "scale": "fp32"}
    return Request(
        "graphwright.kernels.tile_mass:_mass_kernel",
        {**signature, **dict.fromkeys((*counts, *strides), "i32")},
        {"D": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d},
        sm,
        config.num_warps,
        config.num_stages,
        aligned=strides,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [*CASES, {"grid": (5, 9, 20), "tile": (2, 8, 8), "head_dim": 128}], ids=str)
def test_on_the_gpu(dtype, case):
    args, sizes = make_case(**case, dtype=dtype)
    on_gpu = [tensor.cuda() for tensor in args]
    result = tile_mass(*on_gpu, **sizes)
    assert_within_rounding([table.cpu() for table in result], args, sizes)
    assert all(torch.equal(a, b) for a, b in zip(result, tile_mass(*on_gpu, **sizes), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_the_gpu_holds_no_map():
    (query, key, order), sizes = make_case((32, 16, 16), (2, 8, 8), head_dim=64, dtype=torch.bfloat16)
    args = query.cuda(), key.cuda(), order.cuda()
    tile_mass(*args, **sizes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tile_mass(*args, **sizes)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20  # one map of one head is 256 MiB
