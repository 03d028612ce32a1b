"""Appending: once, whatever the pieces; in place as out of place; and nothing beyond the store."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument
from graphwright.kernels.cache_append import cache_append, reference
from graphwright.kernels.packed_cache import BITS, GROUP, Packing, dequantize, round_trip

FORMS = ("per_token", "per_channel", "per_group")


def empty(packing: Packing, tokens: int, batch: int = 1, heads: int = 2) -> torch.Tensor:
    return torch.zeros(batch, heads, packing.bytes_for(tokens), dtype=torch.uint8)


def read(store: torch.Tensor, packing: Packing, tokens: int) -> torch.Tensor:
    """The first tokens that a store holds, written independently of the attention's kernels."""
    planes = packing.planes(store)
    found = dequantize(planes.codes, planes.steps, packing)
    if planes.tail is not None:
        start = (tokens - 1) // GROUP * GROUP
        found = torch.cat([found[:, :, :start], planes.tail.float()], 2)
    return found[:, :, :tokens]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(BITS),
    form=st.sampled_from(FORMS),
    pieces=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_pieces_do_not_matter(bits, form, pieces, seed):
    total = sum(pieces)
    packing = Packing(bits, form, 32)
    new = torch.randn(1, 2, total, 32, generator=torch.Generator().manual_seed(seed))
    store, start = empty(packing, total), 0
    for count in pieces:
        positions = torch.arange(start, start + count)
        store = cache_append(store, positions, new[:, :, start : start + count], bits, form)
        start += count
    torch.testing.assert_close(read(store, packing, total), round_trip(new, bits, form), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_is_never_quantized_again(form):
    packing = Packing(4, form, 32)
    torch.manual_seed(0)
    store = cache_append(empty(packing, 128), torch.arange(64), torch.randn(1, 2, 64, 32), 4, form)
    before = read(store, packing, 64)[:, :, :32]
    for position in range(64, 128):
        store = cache_append(store, torch.tensor([position]), 100 * torch.randn(1, 2, 1, 32), 4, form)
    assert torch.equal(read(store, packing, 128)[:, :, :32], before)


def test_the_functional_form_leaves_the_store_and_the_other_writes_it():
    packing = Packing(4, "per_token", 32)
    store, new = empty(packing, 8), torch.randn(1, 2, 3, 32)
    result = cache_append(store, torch.arange(2, 5), new, 4, "per_token")
    assert not store.any()
    written = torch.ops.graphwright.cache_append_(store, torch.arange(2, 5), new, 4, "per_token")
    assert written.data_ptr() == store.data_ptr()
    assert torch.equal(store, result)
    assert torch.equal(result, reference(empty(packing, 8), torch.arange(2, 5), new, 4, "per_token"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_dtypes_and_batches(dtype, batch):
    packing = Packing(8, "per_token", 64)
    new = torch.randn(batch, 2, 5, 64, dtype=dtype)
    store = cache_append(empty(packing, 6, batch), torch.arange(5), new, 8, "per_token")
    assert torch.equal(read(store, packing, 5), round_trip(new, 8, "per_token"))


def test_nothing_is_appended_of_nothing():
    store = empty(Packing(4, "per_channel", 32), 32)
    assert torch.equal(cache_append(store, torch.arange(0), torch.randn(1, 2, 0, 32), 4, "per_channel"), store)


@pytest.mark.parametrize(
    ("positions", "new", "bits", "form", "reason"),
    [
        ([8], (1, 2, 1, 32), 4, "per_token", "positions 8 to 8 do not fit a cache of 8 tokens"),
        ([-1], (1, 2, 1, 32), 4, "per_token", "positions -1 to -1"),
        ([7, 8], (1, 2, 2, 32), 4, "per_token", "positions 7 to 8"),
        ([0], (1, 3, 1, 32), 4, "per_token", "expected .*H=2"),
        ([0], (1, 2, 2, 32), 4, "per_token", "expected .*T=1"),
        ([0], (1, 2, 1, 32), 3, "per_token", "got bits=3, expected one of 8, 4, 2"),
        ([0], (1, 2, 1, 20), 4, "per_token", "multiple of 8"),
        ([0], (1, 2, 1, 32), 4, "per_head", "got form 'per_head'"),
        ([0], (1, 2, 1, 64), 8, "per_token", "no whole number of tokens"),
    ],
)
def test_what_does_not_fit_is_refused(positions, new, bits, form, reason):
    store = empty(Packing(4, "per_token", 32), 8)
    with pytest.raises(InvalidArgument, match=reason):
        cache_append(store, torch.tensor(positions), torch.randn(new), bits, form)


def test_shapes_are_known_without_data():
    meta = [torch.zeros(1, 2, 160, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 1, 32)]
    assert cache_append(*(tensor.to("meta") for tensor in meta), 4, "per_token").shape == (1, 2, 160)
