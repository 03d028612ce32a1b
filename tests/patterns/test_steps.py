"""Ranges of denoising steps: where they are cut, what they are called, and which timesteps belong to them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument
from graphwright.patterns.steps import DEFAULT_TIMESTEPS, Schedule, checked_timesteps, step_ranges


def test_buckets_after_the_dense_steps():
    ranges = step_ranges(DEFAULT_TIMESTEPS, [Schedule(15, 50, tuple(range(15, 50, 5)))])
    assert [(r.name, r.first, r.last) for r in ranges[:3]] == [
        ("dense", 0, 14), ("sparse_1", 15, 19), ("sparse_2", 20, 24),
    ]  # fmt: skip
    assert len(ranges) == 8
    assert ranges[0].at_most is None
    assert ranges[0].at_least == ranges[1].at_most == 710  # halfway between the steps at 720 and 700
    assert ranges[-1].at_least is None
    assert ranges[1].middle == 17


def test_dense_steps_at_both_ends_and_one_range_between():
    ranges = step_ranges([10, 8, 6, 4, 2], [Schedule(1, 4)])
    assert [(r.name, r.first, r.last) for r in ranges] == [("dense", 0, 0), ("sparse", 1, 3), ("dense_tail", 4, 4)]


def test_two_methods_share_the_cuts():
    ranges = step_ranges(range(20, 0, -2), [Schedule(1, 10), Schedule(3, 10, (3, 8))])
    assert [(r.name, r.first) for r in ranges] == [("dense", 0), ("sparse_1", 1), ("sparse_2", 3), ("sparse_3", 8)]


def test_no_method_that_cuts_gives_no_ranges():
    assert step_ranges(DEFAULT_TIMESTEPS, []) == []
    assert step_ranges([3, 2, 1], [Schedule(3, 3)]) == []


@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=60, unique=True),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=3),
)
def test_every_step_is_in_its_own_range(values, spans):
    timesteps = sorted(values, reverse=True)
    ranges = step_ranges(timesteps, [Schedule(min(span), max(span)) for span in spans])
    for step, timestep in enumerate(timesteps if ranges else []):
        found = next(
            r
            for r in ranges
            if (r.at_least is None or timestep >= r.at_least) and (r.at_most is None or timestep <= r.at_most)
        )
        gaps = [a - b for a, b in pairwise(timesteps)]
        if min(gaps, default=1) > 1e-9:  # neighbours that a float cannot halve may fall to either side
            assert found.first <= step <= found.last
    assert len({r.name for r in ranges}) == len(ranges)


@pytest.mark.parametrize(
    ("timesteps", "reason"),
    [([], "empty"), ([500, 600], "must fall from step to step, got 500 and then 600"), ([5, 5], "must fall")],
)
def test_timesteps_that_do_not_fall_are_refused(timesteps, reason):
    with pytest.raises(InvalidArgument, match=reason):
        checked_timesteps(timesteps)


def test_timesteps_may_be_a_tensor():
    assert checked_timesteps(torch.tensor([3, 1])) == [3.0, 1.0]


def test_steps_of_one_label_share_a_range():
    timesteps = [1000.0 - 100 * step for step in range(6)]
    ranges = step_ranges(timesteps, [Schedule(1, 6, (), (10, 5, 0, 5, 5, 0))])
    assert [(r.name, r.steps) for r in ranges] == [("dense", [0]), ("sparse_1", [1, 3, 4]), ("sparse_2", [2, 5])]
    first = ranges[1]
    assert (first.at_least, first.at_most) == (850.0, 950.0)
    assert [(span.at_least, span.at_most) for span in first.more] == [(550.0, 750.0)]
    assert first.middle == 3
    # With another method the ranges are cut at its edges too, and only steps that are alike for both share one.
    both = step_ranges(timesteps, [Schedule(1, 6, (), (10, 5, 0, 5, 5, 0)), Schedule(4, 6)])
    assert [r.steps for r in both] == [[0], [1, 3], [2], [4], [5]]


def test_a_range_without_labels_is_never_joined():
    ranges = step_ranges([5.0, 4.0, 3.0, 2.0, 1.0], [Schedule(1, 4, (2, 3))])
    assert [(r.name, r.steps) for r in ranges] == [
        ("dense", [0]), ("sparse_1", [1]), ("sparse_2", [2]), ("sparse_3", [3]), ("dense_tail", [4])
    ]  # fmt: skip


def test_a_phase_of_several_ranges_holds_in_each():
    from graphwright.phases import plan_steps

    timesteps = [1000.0 - 100 * step for step in range(6)]
    plans = plan_steps("t", step_ranges(timesteps, [Schedule(1, 6, (), (10, 5, 0, 5, 5, 0))]))
    taken = [
        next(plan.name for plan in plans if all(c.holds({"t": timestep}) for c in plan.conditions))
        for timestep in timesteps
    ]
    assert taken == ["dense", "sparse_1", "sparse_2", "sparse_1", "sparse_1", "sparse_2"]
    assert str(plans[1].conditions[0]) == "t[0] >= 850 and t[0] <= 950 or t[0] >= 550 and t[0] <= 750"
