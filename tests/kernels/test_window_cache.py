"""Windowed caches: what they hold after any pieces, what each query sees, padding, dtypes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels.window_cache import dropped, parts, slots_for
from graphwright.kernels.window_cache_append import reference as append_one_by_one
from graphwright.kernels.window_cache_append import window_cache_append
from graphwright.kernels.window_cache_attention import _cuda as on_cuda
from graphwright.kernels.window_cache_attention import reference, window_cache_attention

DIM = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def empty(sinks: int, window: int, dtype: torch.dtype = torch.float32, batch: int = 1, dim: int = DIM) -> Tensor:
    return torch.zeros(batch, 2, slots_for(sinks, window, dtype), dim, dtype=dtype)


def rows(count: int, heads: int = 2, batch: int = 1, seed: int = 0, dim: int = DIM) -> Tensor:
    return torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(seed))


def in_pieces(store: Tensor, new: Tensor, pieces: list[int], sinks: int, starts: Tensor | None = None) -> Tensor:
    first = 0
    for count in pieces:
        positions = torch.arange(first, first + count)
        store = window_cache_append(store, positions, new[:, :, first : first + count], sinks, starts)
        first += count
    return store


def assert_same(found: Tensor, wanted: Tensor, sinks: int, tokens: int) -> None:
    """Slots equal bit by bit, means up to the rounding of sums of so many terms of about 1."""
    a, b = parts(found, sinks), parts(wanted, sinks)
    assert torch.equal(a.sinks, b.sinks)
    assert torch.equal(a.ring, b.ring)
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=4 * tokens**0.5 * 2**-23)
    torch.testing.assert_close(a.stand, a.mean.to(found.dtype), rtol=0, atol=0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    sinks=st.integers(0, 5),
    window=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    starts=st.none() | st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_pieces_do_not_matter(pieces, sinks, window, dtype, starts):
    """A prefill, pieces, and one token at a time leave the same state; the oracle writes one at a time."""
    total = sum(pieces)
    new = rows(total, batch=2).to(dtype)
    at = None if starts is None else torch.tensor(starts)
    found = in_pieces(empty(sinks, window, dtype, batch=2), new, pieces, sinks, at)
    wanted = append_one_by_one(empty(sinks, window, dtype, batch=2), torch.arange(total), new, sinks, at)
    assert_same(found, wanted, sinks, total)


def test_what_a_store_holds():
    new = rows(100)
    of = parts(in_pieces(empty(3, 20), new, [60, 1, 39], 3), 3)
    assert torch.equal(of.sinks, new[:, :, :3])
    assert torch.equal(of.ring, new[:, :, 80:].roll(80 % 20, 2))
    torch.testing.assert_close(of.mean, new[:, :, 3:80].mean(2))
    assert dropped(100, 20, 3) == 77


def test_padding_is_neither_sink_nor_in_the_mean():
    new = rows(50, batch=2)
    new[1, :, :7] = 1e4
    store = in_pieces(empty(2, 10, batch=2), new, [30, 20], 2, torch.tensor([0, 7]))
    for row, begin in ((0, 0), (1, 7)):
        of = parts(store, 2)
        assert torch.equal(of.sinks[row], new[row, :, begin : begin + 2])
        torch.testing.assert_close(of.mean[row], new[row, :, begin + 2 : 40].mean(1))


def test_writing_from_zero_starts_anew():
    used = in_pieces(empty(2, 10), 100 * rows(40, seed=1), [40], 2)
    fresh = in_pieces(empty(2, 10), rows(25), [20, 5], 2)
    assert_same(in_pieces(used, rows(25), [20, 5], 2), fresh, 2, 25)


def test_a_half_precision_mean_does_not_drift():
    """Small differences from a large value vanish in float16 sums, and do not in the mean's float32."""
    new = (100 + rows(3000)).half()
    of = parts(in_pieces(empty(0, 4, torch.float16), new, [1] * 3000, 0), 0)
    torch.testing.assert_close(of.mean, new[:, :, :2996].float().mean(2), rtol=0, atol=1e-3)


def attended(first: int, count: int, sinks: int, window: int, **options) -> tuple[Tensor, ...]:
    """The arguments of an attention after `first` tokens."""
    dtype, batch = options.pop("dtype", torch.float32), options.pop("batch", 1)
    starts = options.get("starts")
    key, value = (rows(first + count, batch=batch, seed=s).to(dtype) for s in (1, 2))
    stores = [in_pieces(empty(sinks, window, dtype, batch), x, [first], sinks, starts) for x in (key, value)]
    query = rows(count, 6, batch, 3).to(dtype)
    positions = torch.arange(first, first + count)
    new = key[:, :, first:], value[:, :, first:]
    slopes = options.get("slopes")
    compensate = options.get("compensate", slopes is None)
    return (query, *stores, *new, positions, sinks, DIM**-0.5, compensate, starts, slopes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (3, 4), (12, 1), (15, 1), (16, 1), (90, 1), (90, 7)])
def test_the_kernel_is_the_formula(first, count, compensate, dtype):
    for starts in (None, torch.tensor([0, 5])):
        case = attended(first, count, 3, 12, dtype=dtype, batch=2, starts=starts, compensate=compensate)
        # float32: sums of 16 and of some 30 terms; the others round once, to the result.
        eps = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(window_cache_attention(*case), reference(*case), rtol=eps, atol=eps)


SLOPES = torch.tensor([2.0, 0.25, 0.3, 0.01, 0.0, 0.1])
"""Of six query heads."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (3, 4), (12, 1), (15, 1), (16, 1), (90, 1), (90, 7)])
def test_with_slopes_too(first, count, dtype):
    for starts in (None, torch.tensor([0, 5])):
        case = attended(first, count, 3, 12, dtype=dtype, batch=2, starts=starts, slopes=SLOPES)
        # The bias is at most 200 away from that of the query's own token, and rounds in float32.
        eps = 2e-6 + 200 * 2**-23 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(window_cache_attention(*case), reference(*case), rtol=eps, atol=eps)


def test_slopes_are_alibi_over_what_is_kept():
    """Against plain attention with a mask: sinks and ring, wherever the zero point of positions is."""
    for first, count in ((0, 9), (7, 1), (30, 5), (90, 1)):
        case = attended(first, count, 2, 8, slopes=SLOPES)
        key, value = rows(first + count, seed=1), rows(first + count, seed=2)
        j, i = torch.arange(first + count), case[5][:, None]
        kept = (j <= i) & ((j < 2) | (j >= first - 8))
        for bias in (SLOPES[:, None, None] * j, SLOPES[:, None, None] * (j - i)):
            mask = bias.expand(-1, count, -1).masked_fill(~kept, float("-inf"))[None]
            plain = functional.scaled_dot_product_attention(case[0], key, value, mask, enable_gqa=True)
            # Bloom's form adds up to 200 to the scores before their softmax.
            torch.testing.assert_close(window_cache_attention(*case), plain, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(window_cache_attention(*case[:-1]), plain, rtol=1e-2, atol=1e-2)


def test_slopes_of_zero_are_none():
    case = attended(90, 3, 2, 8, slopes=torch.zeros(6))
    torch.testing.assert_close(window_cache_attention(*case), window_cache_attention(*case[:-1]))


def test_slopes_have_no_mean_and_no_kernel_on_cuda():
    case = attended(20, 1, 2, 6, slopes=SLOPES)
    with pytest.raises(InvalidArgument, match="got slopes and compensate, expected compensate=False"):
        window_cache_attention(*case[:8], True, None, SLOPES)
    with pytest.raises(InvalidArgument, match="got slopes of shape"):
        window_cache_attention(*case[:8], False, None, SLOPES[:2])
    with pytest.raises(InvalidArgument, match=r"got slopes of torch\.float64"):
        window_cache_attention(*case[:8], False, None, SLOPES.double())
    with pytest.raises(MissingKernel, match="takes no slopes, so models with ALiBi run on the CPU"):
        on_cuda(*case)


def test_many_queries_are_taken_in_blocks():
    for slopes in (None, SLOPES):
        case = attended(40, 300, 3, 12, slopes=slopes)
        # With slopes biases reach 700, and round in float32.
        eps = 1e-5 if slopes is None else 1e-4
        torch.testing.assert_close(window_cache_attention(*case), reference(*case), rtol=eps, atol=eps)


def test_a_short_context_is_plain_attention():
    """As long as nothing was dropped, razored heads give what all tokens give."""
    for first, count in ((0, 9), (7, 1), (10, 1), (8, 4)):
        case = attended(first, count, 2, 10)
        query, positions = case[0], case[5]
        key, value = rows(first + count, seed=1), rows(first + count, seed=2)
        mask = torch.arange(first + count) <= positions[:, None]
        plain = functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        torch.testing.assert_close(window_cache_attention(*case), plain, rtol=1e-5, atol=1e-5)


def test_the_view_of_each_query():
    """Sinks, the last R tokens before the call, the mean of the others, and the call's tokens up to the query."""
    first, count, sinks, window = 30, 5, 2, 8
    case = attended(first, count, sinks, window)
    key, value = rows(first + count, seed=1), rows(first + count, seed=2)
    for i in range(count):
        kept = [0, 1, *range(first - window, first + i + 1)]
        gone = range(sinks, first - window)
        scores = torch.einsum("hd,htd->ht", case[0][0, ::3, i], key[0]) * DIM**-0.5
        mean = (case[0][0, ::3, i] * key[0, :, gone].mean(1)).sum(-1, keepdim=True) * DIM**-0.5 + math.log(len(gone))
        weights = torch.cat([scores[:, kept], mean], 1).softmax(-1)
        values = torch.cat([value[0, :, kept], value[0, :, gone].mean(1, keepdim=True)], 1)
        wanted = torch.einsum("ht,htd->hd", weights, values)
        torch.testing.assert_close(window_cache_attention(*case)[0, ::3, i], wanted, rtol=1e-5, atol=1e-5)


def test_equal_dropped_keys_lose_nothing():
    """Where the dropped keys coincide the mean stands for them exactly; without it they are missing."""
    key, value = rows(40, seed=1), rows(40, seed=2)
    key[:, :, 2:31] = key[:, :, 2:3]
    stores = [in_pieces(empty(2, 8), x[:, :, :39], [39], 2) for x in (key, value)]
    query = rows(1, 2, seed=3)
    rest = key[:, :, 39:], value[:, :, 39:], torch.tensor([39]), 2, DIM**-0.5
    plain = functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(window_cache_attention(query, *stores, *rest), plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(window_cache_attention(query, *stores, *rest, False), plain, rtol=1e-2, atol=1e-2)


def test_in_place_is_out_of_place():
    new, store = rows(9, seed=4), in_pieces(empty(2, 6), rows(20), [20], 2)
    positions = torch.arange(20, 29)
    wanted = window_cache_append(store, positions, new, 2)
    assert not torch.equal(store, wanted)
    assert torch.ops.graphwright.window_cache_append_(store, positions, new, 2) is store
    assert torch.equal(store, wanted)


def test_operators_are_well_formed():
    store, positions, new = empty(2, 6), torch.arange(3, 7), rows(4)
    for starts in (None, torch.tensor([1])):
        torch.library.opcheck(window_cache_append, (store, positions, new, 2, starts))
        for slopes in (None, SLOPES):
            torch.library.opcheck(window_cache_attention, attended(20, 3, 2, 6, starts=starts, slopes=slopes))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"store": torch.zeros(1, 2, 3, DIM)}, "got 3 slots, expected at least 4 for 2 sinks and a token"),
        ({"new": rows(1, dim=8)}, "expected .*D=16 of store"),
        ({"new": rows(1).half()}, "got new of torch.float16, expected torch.float32 as the store"),
        ({"positions": torch.tensor([-1])}, "got position -1, expected none below 0"),
        ({"positions": torch.tensor([0, 1])}, "got new of shape"),
        ({"starts": torch.tensor([0, 0])}, "got starts of shape"),
    ],
)
def test_appending_refuses(change, reason):
    arguments = {"store": empty(2, 6), "positions": torch.tensor([0]), "new": rows(1), "sinks": 2} | change
    with pytest.raises(InvalidArgument, match=reason):
        window_cache_append(**arguments)


def test_attention_refuses():
    query, key, value, *rest = attended(4, 1, 2, 6)
    with pytest.raises(InvalidArgument, match="got Q=3 in query, expected a multiple of H=2"):
        window_cache_attention(query[:, :3], key, value, *rest)
    with pytest.raises(InvalidArgument, match="got value of shape"):
        window_cache_attention(query, key, value[:, :, 1:], *rest)
    with pytest.raises(InvalidArgument, match="different dtypes"):
        window_cache_attention(query.half(), key, value, *rest)
