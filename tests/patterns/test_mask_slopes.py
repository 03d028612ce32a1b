"""Slopes are what was put in, to the rounding of float32; whatever is no line is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphwright.patterns.mask_sizes import Unproved
from graphwright.patterns.mask_slopes import common_slopes, no_slopes, split_slopes


def mask(slopes: list[float], queries: int, keys: int, shift: Tensor | float = 0.0) -> Tensor:
    """Causal with the last query at the last key, float32 [heads, queries, keys]."""
    line = torch.tensor(slopes)[:, None, None] * torch.arange(keys) + shift
    later = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
    return line.masked_fill(later, torch.finfo(torch.float32).min)


@settings(max_examples=60, deadline=None)
@given(
    slopes=st.lists(st.floats(2**-12, 1.0, width=32), min_size=1, max_size=5),
    queries=st.integers(1, 20),
    more=st.integers(0, 600),
)
def test_slopes_are_found(slopes: list[float], queries: int, more: int):
    value = mask(slopes, queries, queries + more, -torch.arange(queries)[:, None] * 1.0)
    keep, found = split_slopes(value)
    assert torch.equal(keep, value > -1e30)
    if queries + more == 1:
        assert found.values.isnan().all()
        return
    # Both ends of a row round by half a unit in their last place, the shift included.
    largest = torch.where(keep, value.abs(), 0.0).amax((1, 2)).double()
    wanted = torch.tensor(slopes, dtype=torch.float64)
    assert ((found.values - wanted).abs() <= 2**-23 * largest / (queries + more - 1) + 1e-12).all()


@pytest.mark.parametrize("off", [1e-3, -1e-3, 1.0, torch.nan, torch.inf])
def test_one_pair_that_is_off_is_seen(off: float):
    value = mask([0.3, 0.02], 6, 40)
    value[1, 4, 7] += off
    with pytest.raises(Unproved, match="adds a bias, for example"):
        split_slopes(value)


def test_what_is_dropped_has_to_be_far_below_its_row():
    value = mask([0.0], 3, 3)
    value[value < -1] = -9100.0
    assert torch.equal(split_slopes(value)[0], value == 0)
    assert torch.equal(split_slopes(value - 200.0)[0], value == 0)  # the same softmax
    with pytest.raises(Unproved):
        split_slopes(torch.where(value == 0, -300.0, value))


def test_evaluations_have_to_agree():
    wide, narrow, other = (split_slopes(mask([a, 0.25], 4, n))[1] for a, n in ((0.1, 900), (0.1, 5), (0.101, 900)))
    nothing = no_slopes(torch.ones(2, 4, 1, dtype=torch.bool))
    assert common_slopes([("a", narrow), ("b", wide), ("c", nothing)]) == (pytest.approx(0.1, rel=2**-22), 0.25)
    with pytest.raises(Unproved, match=r"grows by 0\.101 a key at c, elsewhere by 0\.1"):
        common_slopes([("a", narrow), ("b", wide), ("c", other)])
    with pytest.raises(Unproved, match=r"elsewhere by 0$"):
        common_slopes([("a", wide), ("b", no_slopes(torch.ones(2, 4, 3, dtype=torch.bool)))])


def test_what_nobody_sees_is_not_known():
    alone, bent = split_slopes(torch.full((1, 1, 1), 0.5)), no_slopes(torch.ones(1, 2, 2, dtype=torch.bool))
    assert alone[1].values.isnan().all()
    assert common_slopes([("a", alone[1]), ("b", bent)]) is None
    half = split_slopes(torch.tensor([[[0.0, 0.5]], [[0.5, -1e9]]]))[1]
    with pytest.raises(Unproved, match="no query sees two keys"):
        common_slopes([("a", half)])
