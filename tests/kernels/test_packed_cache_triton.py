"""The Triton kernels of packed caches: their numbers in the interpreter, what they compile to, and on a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from graphwright.kernels.cache_append import cache_append
from graphwright.kernels.packed_cache import BITS, FORMS, Packing, dequantize, packings
from graphwright.kernels.quantized_cache_attention import quantized_cache_attention, reference
from graphwright.kernels.quantized_cache_attention_triton import block_for, forms

from .aot import Request, compile_kernels
from .interpreter import Call, interpret_groups

pytest.importorskip("triton")
APPEND = "graphwright.kernels.cache_append_triton"
ATTEND = "graphwright.kernels.quantized_cache_attention_triton"
# Where the new tokens start, and how many there are: one, over an edge of a block, several blocks, exactly one block.
PIECES = [(0, 1), (5, 1), (31, 1), (32, 1), (30, 5), (20, 70), (32, 32), (0, 64)]


def filled(form: Any, bits: int, first: int, dim: int, capacity: int = 128) -> Tensor:
    packing = Packing(bits, form, dim)
    store = torch.zeros(1, 2, packing.bytes_for(capacity), dtype=torch.uint8)
    old = torch.randn(1, 2, first, dim, generator=torch.Generator().manual_seed(1))
    return cache_append(store, torch.arange(first), old, bits, form)


def append_cases() -> list[tuple[Any, ...]]:
    cases = []
    for form in ("per_token", "per_channel", "per_group"):
        for number, (first, count) in enumerate(PIECES):
            bits, dtype = BITS[number % 3], (torch.float32, torch.float16)[number % 2]
            dim = 32 if number % 2 else (96 if form == "per_group" else 24)
            new = 3 * torch.randn(1, 2, count, dim, generator=torch.Generator().manual_seed(number)).to(dtype)
            cases.append((filled(form, bits, first, dim), torch.arange(first, first + count), new, bits, form))
    return cases


@cache
def interpreted() -> list[list[Tensor]]:
    """All cases of both operators, in one process."""
    return interpret_groups(
        [Call(f"{APPEND}:launch", (case[0].clone(), *case[1:])) for case in append_cases()],
        [Call(f"{ATTEND}:launch", case) for case in attention_cases()],
    )


def attention_cases() -> list[tuple[Any, ...]]:
    cases = []
    number = 0
    for mode in FORMS:
        for tokens, queries, window in ((1, 1, 0), (33, 1, 0), (300, 1, 0), (100, 40, 0), (290, 30, 70), (64, 2, 1)):
            bits = BITS[number % 3], BITS[number // 3 % 3]
            dims = (64, 32) if number % 2 else ((32, 96) if mode == "kivi" else (24, 40))
            dtype = (torch.float32, torch.float16)[number % 2]
            generator = torch.Generator().manual_seed(number)
            stores = []
            for dim, width, form in zip(dims, bits, FORMS[mode], strict=True):
                packing = Packing(width, form, dim)
                store = torch.zeros(2, 2, packing.bytes_for(320), dtype=torch.uint8)
                new = torch.randn(2, 2, tokens, dim, generator=generator)
                stores.append(cache_append(store, torch.arange(tokens), new, width, form))
            query = torch.randn(2, 6, queries, dims[0], generator=generator).to(dtype)
            positions = torch.arange(tokens - queries, tokens)
            cases.append((query, *stores, positions, *bits, mode, dims[1], dims[0] ** -0.5, window))
            if queries in (1, 40):  # one sequence begins in the middle of the queries, or with the last
                cases.append((*cases[-1], torch.tensor([tokens - 1, tokens // 3])))
            number += 1
    return cases


def test_interpreted_appends_write_the_same_bytes():
    for result, case in zip(interpreted()[0], append_cases(), strict=True):
        expected = cache_append(*case)
        packing = Packing(case[3], case[4], case[2].shape[-1])
        for name, found, wanted in zip(
            ("codes", "steps", "tail"), packing.planes(result), packing.planes(expected), strict=True
        ):
            if found is not None:
                assert torch.equal(found, wanted), (name, case[1], case[3:])


def test_interpreted_attention_agrees_with_the_formula():
    """float32 to the rounding of its sums, float16 to that of keys, weights and values as the products take them."""
    for result, case in zip(interpreted()[1], attention_cases(), strict=True):
        expected = reference(*case)
        largest = float(_values(case).abs().max())
        eps = 2**-10 if case[0].dtype == torch.float16 else 2**-23 * 40
        torch.testing.assert_close(result.float(), expected.float(), rtol=0, atol=4 * eps * largest)


def _values(case: tuple[Any, ...]) -> Tensor:
    packing = Packing(case[5], FORMS[case[6]][1], case[7])
    planes = packing.planes(case[2])
    return dequantize(planes.codes, planes.steps, packing)


def _pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def _part(sm: int, mode: str, bits: tuple[int, int], dim: int, rows: int, dtype: str) -> Request:
    signature = {
        "query": dtype,
        **_pointers("k_codes v_codes", "*u8"),
        **_pointers("k_steps k_tail v_steps v_tail", "*fp16"),
        **_pointers("positions starts", "*i64"),
        **_pointers("part peak total", "*fp32"),
        "scale": "fp32",
        **_pointers("count window group heads key_size value_size splits", "i32"),
    }
    packed = zip(("KEY", "VALUE"), packings(mode, *bits, dim, dim), strict=True)
    sides = {name: value for side, packing in packed for name, value in forms(side, packing, torch.bfloat16).items()}
    block_t, warps = block_for(rows, sides["KEY_WORDS"] and sides["VALUE_WORDS"])
    constants = {
        "DIM": dim, "WIDTH": dim, "KEY_BITS": bits[0], "VALUE_BITS": bits[1], "KIVI": mode == "kivi", "COMPILED": True,
        "BLOCK_R": rows, "BLOCK_T": block_t, "BLOCK_D": dim, "BLOCK_E": dim, "PADDED": True, **sides,
    }  # fmt: skip
    return Request(f"{ATTEND}:_part_kernel", signature, constants, sm, warps, 2, aligned=("key_size", "value_size"))


def _append(sm: int, form: int, bits: int, dim: int) -> Request:
    signature = {
        "codes": "*u8",
        **_pointers("steps tail", "*fp16"),
        "new": "*bf16",
        "positions": "*i64",
        **_pointers("count size", "i32"),
    }
    constants = {
        "DIM": dim, "BITS": bits, "FORM": form, "BLOCK_D": dim, "GROUPS": dim // 32, "PARTS": 8 // bits,
        "BLOCK_W": dim * bits // 8,
    }  # fmt: skip
    return Request(f"{APPEND}:_quantize_kernel", signature, constants, sm)


def test_kernels_compile_within_the_limits_of_each_device():
    parts = (
        ("per_token", (4, 2), 128, 8),
        ("per_token", (8, 8), 128, 8),
        ("per_token", (8, 8), 128, 16),
        ("per_token", (4, 4), 128, 16),
        ("kivi", (4, 4), 128, 8),
        ("per_token", (4, 8), 128, 32),
        ("kivi", (2, 4), 128, 16),
        ("kivi", (8, 8), 128, 32),
    )
    requests = [_part(sm, *part, "*bf16") for sm in (80, 89, 90) for part in parts]
    requests += [_append(sm, form, bits, 128) for sm in (80, 90) for form, bits in ((0, 4), (1, 2), (2, 8))]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)
        if "_part_kernel" in request.kernel:
            assert "mma.sync" in made.ptx or "wgmma" in made.ptx, "products run on the matrix units"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    for case in append_cases():
        on_gpu = [value.cuda() if isinstance(value, Tensor) else value for value in case]
        assert torch.equal(cache_append(*on_gpu).cpu(), cache_append(*case))
    for case in attention_cases():
        on_gpu = [value.cuda() if isinstance(value, Tensor) else value for value in case]
        eps = 2**-10 if case[0].dtype == torch.float16 else 2**-23 * 40
        found = quantized_cache_attention(*on_gpu).cpu()
        atol = 4 * eps * float(_values(case).abs().max())
        torch.testing.assert_close(found.float(), reference(*case).float(), rtol=0, atol=atol)
