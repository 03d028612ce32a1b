"""The Triton kernel: its numbers in the interpreter, what it compiles to, and, where there is one, on a GPU."""

from __future__ import annotations

import pytest
import torch

from graphwright.kernels.band_recall import band_recall, choose_config
from graphwright.kernels.contract import FLOATS

from .aot import Request, compile_kernels
from .interpreter import Call, interpret
from .test_band_recall import assert_within_rounding, make_case

# Batch, heads, length, head_dim: every branch of choose_config, and the edges of its tiles.
SIZES = [(1, 1, 1, 1), (2, 3, 64, 64), (1, 2, 65, 40), (1, 2, 150, 48), (1, 1, 70, 256)]


def test_interpreted_kernel_agrees_with_the_exact_recall():
    cases = [
        make_case(*sizes, dtype=dtype, widths=widths, magnitude=1.5)
        for sizes in SIZES
        for dtype, widths in ((torch.float32, (-1, 0, 7, 64, 500)), (torch.float16, (3,)))
    ]
    calls = [Call("graphwright.kernels.band_recall:launch", case) for case in cases]
    for recall, case in zip(interpret(calls), cases, strict=True):
        assert_within_rounding(recall, *case)


def test_interpreted_kernel_at_the_edges():
    """Strides, a scale of its own, no widths, no heads, and a NaN that stays in its head."""
    query, key, widths = make_case(2, 3, 40, 24)
    apart = query.transpose(1, 2).contiguous().transpose(1, 2), key.mT.contiguous().mT, widths
    bad = query.clone()
    bad[1, 2, 39, 23] = float("nan")
    calls = [
        Call("graphwright.kernels.band_recall:launch", apart, {"scale": 0.4}),
        Call("graphwright.kernels.band_recall:launch", (bad, key, widths)),
        Call("graphwright.kernels.band_recall:launch", (query, key, widths[:0])),
        Call("graphwright.kernels.band_recall:launch", (query[:, :0], key[:, :0], widths)),
    ]
    strided, poisoned, no_widths, no_heads = interpret(calls)
    assert_within_rounding(strided, query, key, widths, 0.4)
    assert poisoned[1, 2].isnan().all()
    assert poisoned.isnan().sum() == len(widths)
    assert no_widths.shape == (2, 3, 0)
    assert no_heads.shape == (2, 0, 4)


def test_configurations_compile_within_the_limits_of_each_device():
    requests = [_request(sm, head_dim, "bf16", 2) for sm in (80, 89, 90) for head_dim in (64, 128)]
    requests += [_request(89, 256, "bf16", 2), _request(89, 64, "fp32", 4), _request(89, 256, "fp32", 4)]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)
        if request.signature["query"] == "*bf16":
            # wgmma multiplies 64 rows at least, which all tiles of 16-bit queries have.
            assert ("wgmma" if request.sm == 90 else "mma.sync") in made.ptx


def _request(sm: int, head_dim: int, kind: str, item_size: int) -> Request:
    config = choose_config(head_dim, item_size)
    strides = tuple(f"{name}_{axis}" for name in ("query", "key") for axis in "bhl")
    signature = {"query": f"*{kind}", "key": f"*{kind}", "widths": "*i32", "sums": "*fp32", "scale": "fp32"}
    return Request(
        "graphwright.kernels.band_recall:_band_kernel",
        {**signature, "H": "i32", "L": "i32", **dict.fromkeys(strides, "i32")},
        {
            "D": head_dim,
            "W": 3,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_W": 4,
        },
        sm,
        config.num_warps,
        config.num_stages,
        aligned=strides,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [*SIZES, (1, 4, 1000, 128)], ids=str)
def test_on_the_gpu(dtype, sizes):
    case = make_case(*sizes, dtype=dtype, widths=(-1, 0, 7, 64, 500))
    assert_within_rounding(band_recall(*(tensor.cuda() for tensor in case)).cpu(), *case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_the_gpu_holds_no_map():
    query, key, widths = (tensor.cuda() for tensor in make_case(1, 2, 8192, 64, dtype=torch.bfloat16))
    band_recall(query, key, widths)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    band_recall(query, key, widths)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20  # one map of one head is 256 MiB
