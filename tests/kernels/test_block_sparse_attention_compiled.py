"""What the Triton kernel compiles to: two programs must fit a multiprocessor of each device, and nothing be spilled."""

from __future__ import annotations

import pytest

from graphwright.kernels.block_sparse_attention_cuda import choose_config, padded

from .aot import Request, compile_kernels

MULTIPROCESSOR = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024}
"""Shared memory of a multiprocessor; each program takes 1 KiB more than it asks for (CUDA programming guide)."""
REGISTERS = 65536
"""Of a multiprocessor, given out by 8 a thread (same guide)."""
BOTH = {"order": True, "bias": True}
HOPPER = [(128, 128, form) for form in ({}, {"order": True}, {"bias": True}, BOTH)]
TILES = {
    80: [(64, 64, {}), (128, 64, {}), (128, 128, BOTH)],
    89: [(64, 128, BOTH), (128, 64, {}), (128, 128, BOTH)],
    90: [(64, 64, BOTH), (64, 128, BOTH), (128, 64, {}), (128, 64, BOTH), *HOPPER],
}
"""Channels, block size and form: elder devices have the same tiles for both block sizes."""


@pytest.mark.parametrize("sm", TILES)
def test_two_programs_fit_a_multiprocessor(sm):
    requests = [_request(sm, head_dim, block_size, **form) for head_dim, block_size, form in TILES[sm]]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(sm), (request, made)
        registers = -(-made.registers // 8) * 8 * 32 * request.num_warps
        assert 2 * registers <= REGISTERS, (request, made)
        assert 2 * (made.shared + 1024) <= MULTIPROCESSOR[sm], (request, made)
        assert ("wgmma" if sm == 90 else "mma.sync") in made.ptx


def test_other_head_dims_and_float32_fit_each_device():
    requests = [_request(sm, head_dim, 64) for sm, head_dim in ((80, 48), (89, 256), (90, 96), (90, 256))]
    requests += [_request(sm, 64, 64, kind="fp32") for sm in (89, 90)]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)


def test_the_kernels_that_order_rows_fit():
    sizes = ["H", "GROUP", "SHARE", "R", "PLACES", "target_h", "target_n", "pattern_b", "order_r"]
    sizes += ["source_b", "source_h", "source_n"]
    rows = {"source": "*bf16", "order": "*i32", "pattern": "*i32", "target": "*bf16", **dict.fromkeys(sizes, "i32")}
    module = "graphwright.kernels.block_sparse_attention_triton"
    requests = [
        Request(f"{module}:order_kernel", rows, {"D": 128, "BLOCK_D": 128, "HAS_PATTERN": True}, sm=90),
        Request(
            f"{module}:front_kernel",
            {"order": "*i32", "front": "*i32", "held": "*i32", "PLACES": "i32"},
            {"BLOCK_SIZE": 128},
            sm=90,
        ),
    ]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)


def _request(
    sm: int, head_dim: int, block_size: int, *, kind: str = "bf16", order: bool = False, bias: bool = False
) -> Request:
    config = choose_config(head_dim, block_size, 4 if kind == "fp32" else 2, (sm // 10, sm % 10))
    channels = padded(head_dim)
    tiles = {"query": config.block_m, "key": config.block_n, "value": config.block_n}
    read = {
        name: f"tensordesc<{kind}[1,1,{rows},{channels}]>" if config.descriptors else f"*{kind}"
        for name, rows in tiles.items()
    }
    indices = dict.fromkeys(("counts", "blocks", "pattern", "order", "held"), "*i32")
    rest = {"key_bias": "*fp32", "head_order": "*i64", "output": f"*{kind}", "lse": "*fp32", "scale": "fp32"}
    sizes = ("H", "GROUP", "R", "Q", "KEY_PLACES", "Q_PLACES", "K_PLACES", "counts_r", "blocks_r", "blocks_q")
    sizes += ("lse_bh", "pattern_b", "order_r", "held_r", "bias_b", "bias_h")
    strides = tuple(f"{name}_{axis}" for name in ("query", "key", "value", "output") for axis in "bhn")[:-1]
    strides = (*(s for s in strides if s not in ("key_n", "value_n")), "output_n")
    return Request(
        "graphwright.kernels.block_sparse_attention_triton:attend_kernel",
        {**read, **indices, **rest, **dict.fromkeys((*sizes, *strides), "i32")},
        {
            "key_n": head_dim,
            "value_n": head_dim,
            "D": head_dim,
            "BLOCK_D": channels,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_SIZE": block_size,
            "DESCRIPTORS": config.descriptors,
            "HAS_PATTERN": True,
            "HAS_ORDER": order,
            "HAS_BIAS": bias,
            "HAS_LSE": True,
            "HAS_HEAD_ORDER": True,
            "WHOLE": True,
        },
        sm,
        config.num_warps,
        config.num_stages,
        aligned=(*strides, "KEY_PLACES"),
        max_registers=config.max_registers,
    )
