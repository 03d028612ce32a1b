"""Attention to a packed cache: the CPU kernel against the formula, and the formula against attention to floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.errors import InvalidArgument
from graphwright.kernels import quantized_cache_attention_cpu
from graphwright.kernels.cache_append import cache_append
from graphwright.kernels.packed_cache import BITS, FORMS, Packing, round_trip
from graphwright.kernels.quantized_cache_attention import quantized_cache_attention, reference

PAIRS = [(k, v) for k in BITS for v in BITS]


def case(
    tokens: int,
    queries: int,
    bits: tuple[int, int] = (4, 4),
    mode: str = "per_token",
    *,
    dims: tuple[int, int] = (32, 32),
    heads: tuple[int, int] = (4, 2),
    batch: int = 1,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[list[Any], Tensor, Tensor]:
    """The operator's arguments for the last `queries` of some tokens, and the keys and values that were appended."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, heads[1], tokens, dim, generator=generator).to(dtype) for dim in dims]
    query = torch.randn(batch, heads[0], queries, dims[0], generator=generator).to(dtype)
    stores = []
    for tensor, form, width in zip(made, FORMS[mode], bits, strict=True):
        packing = Packing(width, form, tensor.shape[-1])
        store = torch.zeros(batch, heads[1], packing.bytes_for(capacity or tokens), dtype=torch.uint8)
        stores.append(cache_append(store, torch.arange(tokens), tensor, width, form))
    positions = torch.arange(tokens - queries, tokens)
    return [query, *stores, positions, *bits, mode, dims[1], dims[0] ** -0.5], made[0], made[1]


def assert_within_rounding(found: Tensor, args: list[Any], window: int = 0, starts: Tensor | None = None) -> None:
    """Sums of D and of up to `tokens` terms in float32, of values up to the values' size."""
    expected = reference(*args, window, starts)
    terms = int(args[3][-1]) + 1 + args[0].shape[-1]
    eps = torch.finfo(args[0].dtype).eps
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=eps, atol=max(eps, terms**0.5 * 8 * torch.finfo(torch.float32).eps)
    )


@pytest.mark.parametrize("mode", FORMS)
@pytest.mark.parametrize("bits", PAIRS)
def test_one_token(mode, bits):
    args, _, _ = case(75, 1, bits, mode)
    assert_within_rounding(quantized_cache_attention(*args), args)


@pytest.mark.parametrize("mode", FORMS)
@pytest.mark.parametrize(("tokens", "queries"), [(1, 1), (31, 31), (32, 32), (33, 1), (64, 40), (97, 5)])
@pytest.mark.parametrize("window", [0, 1, 20, 64])
def test_sizes_and_windows(mode, tokens, queries, window):
    args, _, _ = case(tokens, queries, mode=mode)
    assert_within_rounding(quantized_cache_attention(*args, window), args, window)


@pytest.mark.parametrize("mode", FORMS)
def test_blocks_of_tokens_and_of_queries(mode, monkeypatch):
    monkeypatch.setattr(quantized_cache_attention_cpu, "TOKENS", 64)
    monkeypatch.setattr(quantized_cache_attention_cpu, "QUERIES", 16)
    for tokens, queries, window in ((300, 50, 0), (257, 1, 0), (300, 50, 90)):
        args, _, _ = case(tokens, queries, mode=mode, capacity=400)
        assert_within_rounding(quantized_cache_attention(*args, window), args, window)


@pytest.mark.parametrize("mode", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
def test_dtypes_groups_and_batches(mode, dtype, heads):
    args, _, _ = case(40, 3, (8, 4), mode, heads=heads, batch=2, dims=(64, 32), dtype=dtype)
    found = quantized_cache_attention(*args)
    assert found.dtype == dtype
    assert found.shape == (2, heads[0], 3, 32)
    assert_within_rounding(found, args)


@pytest.mark.parametrize("mode", FORMS)
def test_it_is_attention_to_what_the_cache_gives_back(mode):
    args, key, value = case(50, 50, mode=mode)
    expected = F.scaled_dot_product_attention(
        args[0],
        round_trip(key, 4, FORMS[mode][0]),
        round_trip(value, 4, FORMS[mode][1]),
        is_causal=True,
        enable_gqa=True,
    )
    torch.testing.assert_close(quantized_cache_attention(*args), expected, rtol=1e-5, atol=1e-5)


def test_more_bits_are_nearer_to_full_precision():
    errors = []
    for bits in BITS:
        args, key, value = case(200, 1, (bits, bits))
        exact = F.scaled_dot_product_attention(args[0], key, value, enable_gqa=True)
        errors.append(float((quantized_cache_attention(*args) - exact).norm() / exact.norm()))
    assert errors[0] < 0.02
    assert errors == sorted(errors)
    assert errors[1] > 5 * errors[0], "a step of 4 bits is 17 times as wide as one of 8"


@pytest.mark.parametrize("mode", FORMS)
def test_token_by_token_is_as_pieces_of_32(mode):
    """What the evaluation of a program relies on: aligned pieces see what decoding sees."""
    args, key, value = case(96, 96, mode=mode)
    query, forms = args[0], FORMS[mode]

    def decoded(piece: int) -> Tensor:
        stores = [torch.zeros_like(store) for store in args[1:3]]
        outputs = []
        for start in range(0, 96, piece):
            at = torch.arange(start, start + piece)
            stores = [
                cache_append(store, at, new[:, :, start : start + piece], 4, form)
                for store, new, form in zip(stores, (key, value), forms, strict=True)
            ]
            outputs.append(quantized_cache_attention(query[:, :, start : start + piece], *stores, at, *args[4:]))
        return torch.cat(outputs, 2)

    torch.testing.assert_close(decoded(1), decoded(32), rtol=1e-5, atol=1e-5)


def test_what_was_never_written_does_not_matter():
    args, _, _ = case(40, 2, capacity=64)
    expected = quantized_cache_attention(*args)
    for store in args[1:3]:
        planes = Packing(4, "per_token", 32).planes(store)
        planes.steps[:, :, 40:] = float("nan")
    assert torch.equal(quantized_cache_attention(*args), expected)
    assert_within_rounding(expected, args)


@pytest.mark.parametrize("mode", FORMS)
@pytest.mark.parametrize(("tokens", "queries", "window"), [(70, 1, 0), (70, 1, 9), (70, 70, 0), (300, 40, 90)])
@pytest.mark.parametrize("starts", [(0, 0), (5, 40), (33, 69)])
def test_padding_on_the_left(mode, tokens, queries, window, starts, monkeypatch):
    monkeypatch.setattr(quantized_cache_attention_cpu, "TOKENS", 64)
    monkeypatch.setattr(quantized_cache_attention_cpu, "QUERIES", 16)
    args, _, _ = case(tokens, queries, mode=mode, batch=2)
    begins = torch.tensor(starts)
    found = quantized_cache_attention(*args, window, begins)
    assert_within_rounding(found, args, window, begins)
    for row, start in enumerate(starts):
        blind = args[3] < start
        assert not found[row][:, blind].any(), "a query in the padding sees nothing"
        assert found[row][:, ~blind].any(-1).all()
    unpadded = quantized_cache_attention(*args, window)
    assert torch.equal(found, unpadded) == (max(starts) <= max(0, tokens - queries - window + 1 if window else 0))


def test_padding_may_hold_anything():
    """What stands before a start has no weight: the same as alone, in a store that never held it."""
    args, key, value = case(40, 1, batch=2)
    found = quantized_cache_attention(*args, 0, torch.tensor([0, 15]))[1:]
    stores = [torch.zeros(1, 2, Packing(4, "per_token", 32).bytes_for(25), dtype=torch.uint8) for _ in range(2)]
    stores = [
        cache_append(store, torch.arange(25), new[1:, :, 15:], 4, "per_token")
        for store, new in zip(stores, (key, value), strict=True)
    ]
    alone = quantized_cache_attention(args[0][1:], *stores, torch.tensor([24]), *args[4:])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_no_query_gives_nothing():
    args, _, _ = case(8, 1)
    args[0], args[3] = args[0][:, :, :0], args[3][:0]
    assert quantized_cache_attention(*args).shape == (1, 4, 0, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({3: torch.tensor([8])}, "positions 8 to 8 do not fit a cache of 8 tokens"),
        ({0: torch.randn(1, 3, 1, 32)}, "got Q=3 in query, expected a multiple of H=2"),
        ({0: torch.randn(1, 4, 2, 32)}, "expected .*N=2"),
        ({4: 5}, "got key_bits=5"),
        ({6: "per_head"}, "got mode 'per_head', expected per_token or kivi"),
        ({7: 12}, "got value_dim=12"),
        ({1: torch.zeros(1, 2, 9)}, "got key of torch.float32"),
        ({9: 0, 10: torch.tensor([0, 0])}, "got starts of shape .2., expected .B. with B=1"),
        ({9: 0, 10: torch.tensor([0.0])}, "got starts of torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, reason):
    args, _, _ = case(8, 1)
    for position, value in change.items():
        args[position : position + 1] = [value]
    with pytest.raises(InvalidArgument, match=reason):
        quantized_cache_attention(*args)
