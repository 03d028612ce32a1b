"""The Triton kernels of windowed caches: their numbers in the interpreter, what they compile to, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from graphwright.kernels.window_cache import parts, slots_before_sinks, slots_for
from graphwright.kernels.window_cache_append import reference as append_one_by_one
from graphwright.kernels.window_cache_append import window_cache_append
from graphwright.kernels.window_cache_attention import reference, window_cache_attention

from .aot import Request, compile_kernels
from .interpreter import Call, interpret, interpret_groups

pytest.importorskip("triton")
APPEND = "graphwright.kernels.window_cache_append_triton"
ATTEND = "graphwright.kernels.window_cache_attention_triton"
FLOATS = (torch.float32, torch.float16)  # the interpreter computes bfloat16 wrongly
TRITON = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Tokens held before, tokens that come, sinks, window: nothing held, sinks filling, the ring filling and just full, the
# first dropped, one and many dropped; then pieces that begin, cross and outgrow the ring, in one and in many blocks.
STEPS = [(0, 1, 3, 12), (1, 1, 3, 12), (12, 1, 3, 12), (14, 1, 3, 12), (15, 1, 3, 12), (16, 1, 3, 12), (90, 1, 0, 7)]
PIECES = [(0, 5, 3, 12), (2, 14, 3, 12), (10, 9, 0, 1), (90, 7, 3, 12), (0, 150, 40, 12), (20, 300, 4, 100)]
# Of attention alone: columns that are split among programs, and queries enough for several blocks.
LONG = [(400, 1, 4, 300), (150, 1, 4, 300), (350, 10, 5, 150), (0, 40, 2, 50)]


def rows(count: int, heads: int = 2, batch: int = 2, seed: int = 0, dim: int = 16) -> Tensor:
    return torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(seed))


def holding(tokens: Tensor, sinks: int, window: int, starts: Tensor | None) -> Tensor:
    """A store after these tokens; what was never written is NaN, which the kernels have to leave alone."""
    batch, heads, count, dim = tokens.shape
    store = torch.full((batch, heads, slots_for(sinks, window, tokens.dtype), dim), float("nan"), dtype=tokens.dtype)
    parts(store, sinks).mean.fill_(float("nan"))  # two of a 16-bit dtype are none of float32
    return window_cache_append(store, torch.arange(count), tokens, sinks, starts)


def padding(first: int, count: int) -> list[Tensor | None]:
    """None; a sequence without and one that begins in the other's sinks; one that begins amid the call's tokens."""
    return [None, torch.tensor([[0, 5], [first // 2, first + count // 2]][(first + count) % 2])]


def append_cases() -> list[tuple[Any, ...]]:
    cases = []
    for number, (first, count, sinks, window) in enumerate(STEPS + PIECES):
        for kind, starts in enumerate(padding(first, count)):
            dtype, dim = FLOATS[(number + kind) % 2], (16, 24, 64)[number % 3]
            new = rows(first + count, seed=number, dim=dim).to(dtype)
            store = holding(new[:, :, :first], sinks, window, starts)
            cases.append((store, torch.arange(first, first + count), new[:, :, first:], sinks, starts))
    return cases


def attention_cases() -> list[tuple[Any, ...]]:
    cases = []
    for number, (first, count, sinks, window) in enumerate(STEPS + PIECES[:4] + LONG):
        for kind, starts in enumerate(padding(first, count)):
            dtype, dims = FLOATS[(number + kind) % 2], ((16, 24), (32, 32), (64, 8))[number % 3]
            key, value = (rows(first + count, seed=s, dim=dim).to(dtype) for s, dim in zip((1, 2), dims, strict=True))
            query = rows(count, (2, 6)[kind], seed=3, dim=dims[0]).to(dtype)
            stores = [holding(x[:, :, :first], sinks, window, starts) for x in (key, value)]
            new, positions = (key[:, :, first:], value[:, :, first:]), torch.arange(first, first + count)
            compensate = number % 4 != 3
            cases.append((query, *stores, *new, positions, sinks, dims[0] ** -0.5, compensate, starts))
    return cases


@cache
def interpreted() -> list[list[Tensor]]:
    """All cases of both operators, in one process."""
    return interpret_groups(
        [Call(f"{APPEND}:launch", (case[0].clone(), *case[1:])) for case in append_cases()],
        [Call(f"{ATTEND}:launch", case) for case in attention_cases()],
    )


def assert_appended(found: Tensor, case: tuple[Any, ...]) -> None:
    """Slots equal bit by bit, NaN where nothing was written, means up to the rounding of sums of terms of about 1."""
    store, positions, new, sinks, starts = case
    clean = store.clone()
    parts(clean, sinks).mean.nan_to_num_(0.0)  # the oracle multiplies the mean of no tokens
    a, b = parts(found, sinks), parts(append_one_by_one(clean, positions, new, sinks, starts), sinks)
    torch.testing.assert_close(a.sinks, b.sinks, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a.ring, b.ring, rtol=0, atol=0, equal_nan=True)
    tokens = int(positions[-1]) + 1
    for row, begin in enumerate([0] * len(store) if starts is None else starts.tolist()):
        if tokens - a.ring.shape[2] - begin - sinks > 0:
            torch.testing.assert_close(a.mean[row], b.mean[row], rtol=0, atol=4 * tokens**0.5 * 2**-23)
            assert torch.equal(a.stand[row], a.mean[row].to(found.dtype)), "attention reads the mean as it is stored"
        else:
            assert a.mean[row].isnan().all(), "nothing left the ring"


def assert_attended(found: Tensor, case: tuple[Any, ...]) -> None:
    """float32 to the rounding of its sums; 16 bits to that of the weights, which sum to 1, and of the result."""
    clean = (case[0], *(store.nan_to_num(0.0) for store in case[1:3]), *case[3:])
    largest = max(float(value.abs().nan_to_num(0.0).max()) for value in (parts(case[2], case[6]).seen, case[4]))
    eps = 2**-23 * 40 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), reference(*clean).float(), rtol=0, atol=2 * eps * largest)


def test_interpreted_appends_leave_the_state_of_the_formula():
    for result, case in zip(interpreted()[0], append_cases(), strict=True):
        assert_appended(result, case)


def test_interpreted_attention_agrees_with_the_formula():
    for result, case in zip(interpreted()[1], attention_cases(), strict=True):
        assert_attended(result, case)


def test_writing_from_zero_starts_anew():
    """What an old sequence left is not read: neither its mean by the append, nor any of it by attention."""
    dirty, key = holding(100 * rows(80), 3, 12, None), rows(40, seed=5)
    case = rows(40, 4, seed=3), dirty, dirty, key, key, torch.arange(40), 3, 0.25
    attended, appended = interpret(
        [Call(f"{ATTEND}:launch", case), Call(f"{APPEND}:launch", (dirty.clone(), case[5], key, 3))]
    )
    assert_attended(attended, (*case, True, None))
    assert_appended(appended, (dirty, case[5], key, 3, None))


def test_a_store_that_is_a_view_is_written_in_place():
    new = rows(30, dim=16)
    store = holding(new[:, :, :20], 2, 6, None)
    wide = torch.stack([store, torch.zeros_like(store)], 2).flatten(1, 2)  # every other head is another's
    cases = [(torch.arange(20, 20 + count), new[:, :, 20 : 20 + count], 2) for count in (1, 9)]
    calls = [Call(f"{APPEND}:launch", (wide.clone()[:, ::2], *case)) for case in cases]
    for found, case in zip(interpret(calls), cases, strict=True):
        assert_appended(found, (store, *case, None))
        whole = found.as_strided(wide.shape, wide.stride(), 0)  # a view is saved with all that it is a view of
        assert torch.equal(whole[:, ::2], found)
        assert not whole[:, 1::2].any()


def _pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def _part(sm: int, dim: int, rows: int, dtype: torch.dtype) -> Request:
    from graphwright.kernels.window_cache_attention_triton import choose_blocks

    split = rows <= 16
    signature = {
        **_pointers("query key value new_key new_value", TRITON[dtype]),
        **_pointers("positions starts", "*i64"),
        "part": "*fp32" if split else TRITON[dtype],
        **_pointers("peak total", "*fp32"),
        "scale": "fp32",
        **_pointers("count group heads sinks window splits", "i32"),
    }
    cut, block = choose_blocks(rows, dim, dtype), 1 << (dim - 1).bit_length()
    constants = {
        "DIM": dim, "WIDTH": dim, "LEAD": slots_before_sinks(dtype), "BLOCK_R": cut.rows, "BLOCK_T": cut.tokens,
        "BLOCK_D": block, "BLOCK_E": block, "COMPENSATE": True, "PADDED": True, "SPLIT": split,
    }  # fmt: skip
    return Request(f"{ATTEND}:_part_kernel", signature, constants, sm, num_warps=cut.warps, num_stages=cut.stages)


def _append(sm: int, kernel: str, dim: int, dtype: torch.dtype) -> Request:
    from graphwright.kernels.window_cache_append_triton import block_tokens

    signature = {"store": TRITON[dtype], "new": TRITON[dtype], **_pointers("positions starts", "*i64")}
    signature |= _pointers("heads sinks window", "i32")
    constants = {"DIM": dim, "LEAD": slots_before_sinks(dtype), "BLOCK_D": dim, "PADDED": True}
    if kernel != "_leaving_kernel":
        signature["mean"] = "*fp32"
    if kernel != "_step_kernel":
        signature |= {"part": "*fp32", **_pointers("count splits", "i32")}
        constants["BLOCK_T"] = block_tokens(dim)
    return Request(f"{APPEND}:{kernel}", signature, constants, sm, num_warps=1 if kernel == "_step_kernel" else 4)


def _with_ones(request: Request) -> Request:
    """As Triton specialises a launch without padding whose numbers are all 1, each then a constant."""
    ones = {name for name, kind in request.signature.items() if kind == "i32" and name != "window"}
    signature = {name: kind for name, kind in request.signature.items() if name not in ones}
    constants = request.constants | {"PADDED": False, **dict.fromkeys(ones, 1)}
    return replace(request, signature=signature, constants=constants)


def _assert_fits(requests: list[Request]) -> None:
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)
        if request.signature.get("query") in ("*bf16", "*fp16"):
            assert "mma.sync" in made.ptx or "wgmma" in made.ptx, "products run on the matrix units"


@pytest.mark.parametrize("sm", [80, 89, 90])
def test_attention_compiles_within_the_limits_of_each_device(sm):
    """One query and many, the smallest, the largest and an odd head; float32 where it is cut otherwise."""
    of = [(dim, rows, torch.bfloat16) for dim in (64, 128, 256) for rows in (16, 512)]
    of += [(32, 16, torch.float16), (96, 512, torch.float16), (64, 512, torch.float32), (256, 16, torch.float32)]
    _assert_fits([*(_part(sm, *case) for case in of), _with_ones(_part(sm, 128, 16, torch.bfloat16))])


def test_appending_compiles_within_the_limits_of_each_device():
    kernels = ("_step_kernel", "_leaving_kernel", "_write_kernel")
    of = [(kernel, 256, torch.float32) for kernel in kernels]
    of += [(kernel, dim, torch.bfloat16) for kernel in kernels for dim in (64, 256)]
    requests = [_append(sm, *case) for sm in (80, 89, 90) for case in of]
    _assert_fits(requests + [_with_ones(request) for request in requests[:3]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    def on_gpu(case: tuple[Any, ...]) -> list[Any]:
        return [value.cuda() if isinstance(value, Tensor) else value for value in case]

    for first, count, sinks, window in STEPS + PIECES + LONG:
        for starts in padding(first, count):
            for dim in (32, 64, 96, 128, 256):
                key, value = (rows(first + count, seed=s, dim=dim).to(dtype) for s in (1, 2))
                stores = [holding(x[:, :, :first], sinks, window, starts) for x in (key, value)]
                new, positions = (key[:, :, first:], value[:, :, first:]), torch.arange(first, first + count)
                query = rows(count, 6, seed=3, dim=dim).to(dtype)
                case = query, *stores, *new, positions, sinks, dim**-0.5, True, starts
                assert_attended(window_cache_attention(*on_gpu(case)).cpu(), case)
                append = stores[0], positions, new[0], sinks, starts
                assert_appended(window_cache_append(*on_gpu(append)).cpu(), append)
