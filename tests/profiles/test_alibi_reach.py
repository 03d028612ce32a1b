"""The reach of ALiBi heads: a bound that holds for every text, and why the printed one is not taken."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.passes.copy_exported import copy_exported
from graphwright.patterns.cache import find_caches
from graphwright.patterns.graph import GraphView
from graphwright.patterns.nodes import arguments
from graphwright.prepare import Prepared, prepare
from graphwright.profiles.alibi_reach import HeadReach, head_reach, logit_bound
from graphwright.profiles.walk import walk
from tests.models import captured_llama, tiny_bloom, tokens

LENGTH = 256
EPS = 1e-3


@cache
def prepared(random: float = 1.0, **options: Any) -> Prepared:
    """A Bloom whose gains, shifts and biases are no ones and zeros, so that each of them matters."""
    model = tiny_bloom(**options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("query_key_value.bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2 * random)
    return prepare(gw.capture_causal_lm(model, LENGTH))


def reaches(of: Prepared, eps: float = EPS, margin: int = 0, phase: str = "prefill") -> list[HeadReach]:
    return head_reach(of.exported[phase], of.sites[phase].cache, eps, margin)


def attention_weights(of: Prepared, ids: Tensor) -> list[Tensor]:
    """[heads, queries, keys] of each layer, from what the program itself attends with."""
    found = []
    sites = of.sites["prefill"].cache

    def handler(node: Any) -> Any:
        scale, names = node.kwargs.get("scale"), list(arguments(node))

        def attend(calls: list[tuple[Any, ...]]) -> list[Any]:
            for args in calls:
                given = dict(zip(names, args, strict=False))
                scores = given["query"] @ given["key"].mT * scale + given["attn_mask"]
                found.append(scores.softmax(-1)[0])
            return [node.target(*args, **node.kwargs) for args in calls]

        return attend

    inputs = [[ids, torch.arange(ids.shape[1])]]
    walk(of.exported["prefill"], inputs, {site.node: handler(site.node) for site in sites})
    return found


def test_no_weight_beyond_the_reach_is_more_than_eps():
    """And where the bias alone would bring a key to eps, there are some: the bound is not idle."""
    of = prepared()
    found = reaches(of)
    within = 0
    for seed in range(3):
        for layer, weights in zip(found, attention_weights(of, tokens(LENGTH, seed)), strict=True):
            away = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
            for head, reach in enumerate(layer.reach):
                slope = layer.slopes[head]
                # float32: what the program computes is off by some units of the last place.
                beyond = weights[head] * (away >= reach)
                assert beyond.max() <= EPS * (1 + 1e-4)
                mass = beyond.sum(-1).max()
                assert mass <= EPS / (1 - math.exp(-slope)) * (1 + 1e-4)
                within += int((weights[head][away >= -math.log(EPS) / slope / 2] > EPS).sum())
                assert math.isfinite(layer.bounds[head])
    assert within > 100
    assert sum(reach < LENGTH for layer in found for reach in layer.reach) >= 2, (
        "reaches are shorter than the text, so that something was tested"
    )


def test_formula_and_margin():
    (layer, _), (with_margin, _) = reaches(prepared()), reaches(prepared(), margin=100)
    assert layer.slopes == (2**-2, 2**-4, 2**-6, 2**-8)
    for bound, slope, reach, more in zip(layer.bounds, layer.slopes, layer.reach, with_margin.reach, strict=True):
        assert reach == pytest.approx((bound - math.log(EPS)) / slope)
        assert more == pytest.approx(reach + 100)


def test_every_phase_says_the_same():
    of = prepared()
    assert reaches(of, phase="decode") == reaches(of, phase="extend") == reaches(of, phase="prefill")


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_for_any_hidden_state(seed: int):
    """Hidden states that are drawn, and those that make the difference as large as they can."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = 24
    query, key, query_bias, key_bias, shift = draw(8, size), draw(8, size), draw(8), draw(8), draw(size)
    gain = draw(size) * torch.tensor([5.0] + [0.1] * (size - 1))
    bound = logit_bound(query, query_bias, key, gain, shift, 0.3)
    h = [draw(500, size) for _ in range(3)]
    # The best other keys for the drawn queries, and the best queries for these.
    h[1] = ((h[0] * gain + shift) @ query.mT + query_bias) @ (key * gain)
    h[2] = -h[1]
    h[0] = (h[1] - h[2]) @ (key * gain).mT @ (query * gain)
    h = [x * (size**0.5 / x.norm(dim=-1, keepdim=True)) for x in h]
    q = (h[0] * gain + shift) @ query.mT + query_bias
    k, own = ((x * gain + shift) @ key.mT + key_bias for x in h[1:])
    difference = (q * (k - own)).sum(-1) * 0.3
    assert float(difference.abs().max()) <= bound * (1 + 1e-12)
    assert float(difference.abs().max()) >= 0.5 * bound, "no looser than it has to be"


def test_the_printed_bound_is_none_with_a_large_gain_of_one_feature():
    """|gain|^2 is 100 here, and a hidden state along that feature has 100 d."""
    size = 16
    gain = torch.full((size,), 0.01)
    gain[0] = 10.0
    query, key = torch.eye(8, size), torch.eye(8, size)
    h = torch.zeros(2, size)
    h[0, 0], h[1, 0] = size**0.5, -(size**0.5)
    x = h * gain
    difference = float(((x[0] @ query.mT) * ((x[0] - x[1]) @ key.mT)).sum())
    printed = 2 * float(torch.linalg.matrix_norm(query.mT @ key, ord=2)) * float(gain.square().sum())
    assert printed < difference <= logit_bound(query, None, key, gain, None, 1.0) * (1 + 1e-6)
    assert logit_bound(query, None, key, None, None, 1.0) == pytest.approx(2 * size)


def test_where_nothing_is_proved_heads_reach_everything():
    exported = copy_exported(prepared().exported["prefill"])
    for node in list(exported.graph.nodes):
        if "layer_norm" in str(node.target):
            node.replace_all_uses_with(node.args[0])
    found = head_reach(exported, find_caches(GraphView(exported), "prefill").sites, EPS)
    assert [layer.reach for layer in found] == [(math.inf,) * 4] * 2
    assert {layer.reason for layer in found} == {"queries and keys are not projected from one normalised hidden state"}


def test_a_model_without_slopes_has_no_reach():
    llama = prepare(captured_llama())
    assert head_reach(llama.exported["decode"], llama.sites["decode"].cache, EPS) == []
