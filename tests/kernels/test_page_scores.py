"""Which pages there are, what they may be worth, and where they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument
from graphwright.kernels.page_scores import POOLINGS, best_pages, page_scores, summarize, turned
from graphwright.kernels.page_tables import empty_tables, forget, place, settle, split_tables
from graphwright.kernels.paging import Paging

PAGING = Paging(page=4, slots=6, sinks=1, window=2)


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 9])])
def test_a_page_is_a_sink_recent_or_a_candidate(starts):
    first = PAGING.first_pages(starts, 2, torch.device("cpu"))
    for position in range(64):
        always, candidates = (f(position, first, 16) for f in (PAGING.always, PAGING.candidates))
        assert not (always & candidates).any()
        there = (torch.arange(16) >= first[:, None]) & (torch.arange(16) <= position // 4)
        assert torch.equal(always | candidates, there)
        assert (always.sum(-1) <= PAGING.sinks + PAGING.window).all()
        several = PAGING.candidates(torch.tensor([position, 63]), first, 16)
        assert torch.equal(several[:, 0], candidates)


def test_a_summary_bounds_every_key_of_its_page():
    keys, query = torch.randn(2, 3, 5, 8, 16), torch.randn(2, 6, 7, 16)
    allowed = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    bounds = page_scores(summarize(keys), query, allowed, "max_score")
    scores = torch.einsum("bhgnd,bhptd->bhngpt", query.unflatten(1, (3, 2)), keys).amax((-1, -3))
    assert (bounds >= scores - 1e-5).all()
    by_hand = torch.maximum(
        query.unflatten(1, (3, 2)).unsqueeze(4) * keys.amin(-2)[:, :, None, None],
        query.unflatten(1, (3, 2)).unsqueeze(4) * keys.amax(-2)[:, :, None, None],
    ).sum(-1)
    torch.testing.assert_close(bounds, by_hand.amax(2))
    shares = by_hand.softmax(-1).mean(2)
    torch.testing.assert_close(page_scores(summarize(keys), query, allowed).exp(), shares)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("scaled", [False, True])
def test_only_candidates_are_chosen(pooling, scaled):
    summary, query = summarize(torch.randn(2, 2, 9, 4, 8)), 30 * torch.randn(2, 4, 3, 8)
    allowed = torch.rand(2, 1, 3, 9) < 0.6
    allowed[0, 0, 0] = False
    chosen = best_pages(page_scores(summary, query, allowed, pooling, scaled), 4)
    assert not (chosen & ~allowed).any()
    assert torch.equal(chosen.sum(-1), allowed.sum(-1).clamp_max(4).expand(2, 2, 3))


def test_scores_that_would_underflow_keep_their_order():
    """Means of softmaxes of bounds in the hundreds are zeros in float32 for all but a page or two."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 64, 4, 32, generator=generator)
    query = 40 * torch.randn(1, 1, 1, 32, generator=generator)
    allowed = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    scores = page_scores(summarize(keys), query, allowed)
    bounds = page_scores(summarize(keys), query, allowed, "mean_score")
    assert (bounds.softmax(-1) == 0).sum() > 2
    assert len(scores.unique()) == 64
    assert torch.equal(scores.argsort(-1), bounds.argsort(-1))


def test_padding_is_not_summarized():
    keys, real = torch.randn(1, 1, 2, 4, 8), torch.tensor([[False, False, True, True], [False] * 4])
    summary = summarize(keys, real)
    assert torch.equal(summary[0, 0, 0], torch.stack((keys[0, 0, 0, 2:].amin(0), keys[0, 0, 0, 2:].amax(0))))
    assert not summary[0, 0, 1].any()


def test_a_group_turns_away_by_its_mean_cosine():
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    query = torch.stack((one, one, one, one))[None, :, None]
    previous = torch.stack((one, one, one, other))[None, :, None]
    assert turned(query, previous, 2, 0.6)[0, :, 0].tolist() == [False, True]
    assert turned(query, previous, 2, 0.4)[0, :, 0].tolist() == [False, False]
    assert turned(query, previous, 2, 1.1).all()
    assert not turned(query, -previous, 2, -1).any()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tables_stay_inverse_to_each_other(data):
    slots, pages = 4, 9
    tables = empty_tables(1, 2, slots, pages, torch.device("cpu"))
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            forget(tables, slots, data.draw(st.integers(0, pages)))
        wanted = np.zeros((1, 2, pages), dtype=bool)
        for head in range(2):
            wanted[0, head, data.draw(st.lists(st.integers(0, pages - 1), max_size=slots))] = True
        table, inverse = split_tables(tables, slots)
        before = table.copy()
        plan = place(tables, slots, wanted)
        settle(tables, slots, plan)
        assert ((inverse >= 0) >= wanted).all()
        for head in range(2):
            for page in range(pages):
                if inverse[0, head, page] >= 0:
                    assert table[0, head, inverse[0, head, page]] == page
            assert (table[0, head] >= 0).sum() == (inverse[0, head] >= 0).sum()
            stayed = [
                slot for slot in range(slots) if before[0, head, slot] >= 0 and wanted[0, head, before[0, head, slot]]
            ]
            assert (table[0, head, stayed] == before[0, head, stayed]).all(), "what is wanted and at hand does not move"


def test_more_pages_than_slots_are_refused():
    tables = empty_tables(1, 1, 2, 5, torch.device("cpu"))
    with pytest.raises(InvalidArgument, match="3 pages are wanted at hand, there are 2 slots"):
        place(tables, 2, np.array([[[True, True, True, False, False]]]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"page": 0}, "got page=0"),
        ({"window": 0}, "got page=4, sinks=1, window=0"),
        ({"slots": 3}, "3 pages at hand leave none to choose beside 1 sinks and 2 recent"),
    ],
)
def test_pagings_that_cannot_be(options, reason):
    with pytest.raises(InvalidArgument, match=reason):
        Paging(**{"page": 4, "slots": 6, "sinks": 1, "window": 2} | options).require()
