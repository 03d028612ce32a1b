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
