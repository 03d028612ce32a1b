"""`analyse_mask` says what a mask is, in whatever way it is written, and says of near misses how near they come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from graphwright.patterns.masks import MaskFact

from .mask_forms import FORMS, NEAR_MISSES, Form, K, S, analysed, causal, facts, near


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms(form: Form):
    fact = analysed(form.keys)[form.name]
    found = (fact.kind, fact.window, fact.per_row, fact.additive, fact.every_row_sees_a_key)
    assert found == (form.kind, form.window, form.per_row, form.additive, form.sees), fact.reason
    read = {node.name.removeprefix("inputs_") for node in (fact.positions, fact.padding) if node is not None}
    assert read - {"b_length"} == {name for name in form.inputs if name not in ("past", "tokens")}
    assert (fact.positions is not None) == form.kind.startswith("cache_")
    assert fact.slopes == form.slopes
    assert fact.starts == ("starts" in form.inputs)


@pytest.mark.parametrize("form", NEAR_MISSES, ids=lambda form: form.name)
def test_near_misses(form: Form):
    fact = analysed(form.keys)[form.name]
    assert fact.kind == "unknown", fact.reason
    assert fact.positions is None
    assert not fact.slopes
    assert fact.padding is None
    assert form.reason in fact.reason
    assert not fact.every_row_sees_a_key


PER_KEY = {
    "padding, int": True,
    "padding, > 0": True,  # expanded to all queries
    "padding, (1 - m) * min": True,
    "padding that is all ones": True,
    "padding inverted": True,
    "weak padding": True,
    "padding of tokens": True,
    "padding of queries": False,
    "[1,1,S,S]": False,
    "[B,H,S,S]": False,
    "bool ones": False,
    "causal and padding": False,
}


@pytest.mark.parametrize("name", PER_KEY)
def test_masks_that_are_the_same_for_all_queries(name: str):
    fact = analysed("queries")[name]
    assert (fact.per_key is not None) == PER_KEY[name]
    if fact.per_key is not None:
        assert tuple(fact.per_key.meta["val"].shape[1:3]) == (1, 1)


def test_without_a_mask():
    def facts_of(*, is_causal: bool, free: bool) -> MaskFact:
        class Plain(nn.Module):
            def forward(self, q: Tensor, k: Tensor) -> Tensor:
                return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=is_causal)

        q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9 if free else 6, 4)
        sizes = {"q": {2: S}, "k": {2: K if free else S}}
        return facts(torch.export.export(Plain(), (q, k), dynamic_shapes=sizes, strict=False))[0]

    assert facts_of(is_causal=False, free=True).kind == "none"
    assert facts_of(is_causal=True, free=False).kind == "causal"
    assert facts_of(is_causal=True, free=True).kind == "causal_top_left"


@settings(max_examples=5, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(-2, 2)), min_size=8, max_size=8, unique=True),
    most=st.integers(8, 60),
)
def test_random_windows(shapes: list[tuple[int, int]], most: int):
    class Windowed(nn.Module):
        def forward(self, q: Tensor) -> list[Tensor]:
            masks = [causal(q.shape[2], None, offset) & near(q.shape[2], window) for window, offset in shapes]
            return [nn.functional.scaled_dot_product_attention(q, q, q, mask) for mask in masks]

    sizes = {"q": {2: Dim("s", min=1, max=most)}}
    exported = torch.export.export(Windowed(), (torch.randn(1, 1, 6, 4),), dynamic_shapes=sizes, strict=False)
    for fact, (window, offset) in zip(facts(exported), shapes, strict=True):
        if offset == 0:
            assert (fact.kind, fact.window) == ("causal", window if window < most else None)
        else:
            assert fact.kind == "unknown"
