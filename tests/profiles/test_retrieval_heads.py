"""Scores of heads: against whole attention matrices, on heads that are made to retrieve, and the random tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.errors import InvalidArgument
from graphwright.prepare import prepare
from graphwright.profiles import retrieval_heads
from graphwright.profiles.retrieval_heads import mass_on_copies, repeated_tokens, score_heads
from tests.models import CACHE, VOCABULARY, tiny_llama


def by_matrix(query: Tensor, key: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """The definition, over the whole attention matrix."""
    count = query.shape[2]
    key = key[:, :, :count].repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    echo, induction = torch.zeros(query.shape[1]), torch.zeros(query.shape[1])
    tokens = range(1 + period, count)
    for i in tokens:
        for back in range(period, i, period):
            echo += weights[:, :, i, i - back].sum(0)
            induction += weights[:, :, i, i - back + 1].sum(0)
    return echo / len(tokens) / len(query), induction / len(tokens) / len(query)


@pytest.mark.parametrize("rows", [256, 7])
@pytest.mark.parametrize(("period", "repeats"), [(10, 4), (2, 3), (25, 2)])
def test_scores_are_those_of_the_matrix(period, repeats, rows, monkeypatch):
    monkeypatch.setattr(retrieval_heads, "ROWS", rows)
    torch.manual_seed(0)
    count = 1 + period * repeats
    query, key = torch.randn(2, 6, count, 8), torch.randn(2, 3, count + 5, 8)
    for found, wanted in zip(mass_on_copies(query, key, period), by_matrix(query, key, period), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_heads_that_retrieve_score_high():
    """One head looks for its own token, one for what followed it, one for nothing: echo, induction, neither."""
    period, repeats = 16, 4
    torch.manual_seed(0)
    table = torch.randn(100, 32)
    ids = repeated_tokens(100, period, repeats, 0, [0])
    own, before = table[ids], table[ids.roll(1)]
    query = 8 * torch.stack([own, own, torch.zeros_like(own)])[None]
    key = torch.stack([own, before, own])[None]
    echo, induction = mass_on_copies(query, key, period)
    assert echo[0] > 0.5  # a third to a fourth of it lies on the token itself
    assert induction[1] > 0.95
    assert max(echo[1], induction[0], echo[2], induction[2]) < 0.15


def test_tokens_are_repeated_and_different():
    ids = repeated_tokens(50, 20, 3, 1, [7, 9])
    assert ids.shape == (61,)
    assert ids[0] == 7
    assert torch.equal(ids[1:21], ids[21:41])
    assert torch.equal(ids[1:21], ids[41:])
    assert len(set(ids[1:21].tolist())) == 20
    assert not {7, 9} & set(ids[1:].tolist())
    assert not torch.equal(ids, repeated_tokens(50, 20, 3, 2, [7, 9]))
    assert len(repeated_tokens(5, 20, 3, 1, [0])) == 61  # a small vocabulary repeats itself
    with pytest.raises(InvalidArgument, match="expected at least 2 tokens twice"):
        repeated_tokens(50, 20, 1, 0)
    with pytest.raises(InvalidArgument, match="none is left to draw"):
        repeated_tokens(2, 20, 3, 1, [0, 1])


def test_a_program_is_scored_as_its_model():
    """Against the weights that transformers returns for the same tokens; groups score by their best head."""
    model = tiny_llama(attn_implementation="eager")
    period = 10
    ids = repeated_tokens(VOCABULARY, period, 3, 0, [1])[None]
    prepared = prepare(gw.capture_causal_lm(model, CACHE))
    sites = prepared.sites["prefill"].cache
    inputs = [[ids, torch.arange(31)]]
    found = score_heads(prepared.exported["prefill"], sites, inputs * 2, period)
    assert [layer.place for layer in found] == [site.place for site in sites]
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    for layer, matrix in zip(found, weights, strict=True):
        for scores, shift in ((layer.echo, 0), (layer.induction, 1)):
            mass = sum(
                matrix[0, :, i, i - back + shift] for i in range(1 + period, 31) for back in range(period, i, period)
            )
            wanted = (mass / (30 - period)).unflatten(0, (2, 2)).amax(-1)
            torch.testing.assert_close(torch.tensor(scores), wanted, rtol=1e-4, atol=1e-6)
