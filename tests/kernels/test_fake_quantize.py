"""Rounding to few bits and back: the grid, its edges, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument
from graphwright.kernels.contract import FLOATS
from graphwright.kernels.fake_quantize import fake_quantize


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    groups=st.integers(1, 4),
    group=st.integers(1, 40),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_every_value_is_within_half_a_step(rows, groups, group, bits, dtype, seed):
    x = (torch.randn(rows, groups * group, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(dtype)
    y = fake_quantize(x, bits, group)
    parts, got = x.double().view(-1, group), y.double().view(-1, group)
    low, high = parts.amin(-1, keepdim=True).clamp_max(0), parts.amax(-1, keepdim=True).clamp_min(0)
    step = (high - low) / (2**bits - 1)
    # Half a step for the value and, at the ends of the range, half a step for the zero point; and x's own rounding.
    assert ((got - parts).abs() <= step * 1.001 + torch.finfo(dtype).eps * parts.abs()).all()
    assert y.dtype == dtype
    for row in got.float().round(decimals=5):
        assert len(row.unique()) <= 2**bits


def test_zeros_stay_and_rows_without_a_grid_become_nan():
    x = torch.randn(3, 8)
    x[0] = 0
    x[1, 2] = float("nan")
    y = fake_quantize(x, 4, 4)
    assert not y[0].any()
    assert y[1, :4].isnan().all()
    assert y[1, 4:].isfinite().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.ones(2, 6), 4, 4), "got K=6 in x, expected a multiple of group=4"),
        ((torch.ones(2, 8), 9, 4), "got bits=9"),
        ((torch.ones(2, 8), 4, 4, 0.0), r"got clip=0\.0"),
        ((torch.ones(2, 8, dtype=torch.int8), 4, 4), "got x of torch.int8"),
    ],
)
def test_refusals(arguments, reason):
    with pytest.raises(InvalidArgument, match=f"^fake_quantize: {reason}"):
        fake_quantize(*arguments)


def test_opcheck():
    torch.library.opcheck(fake_quantize, (torch.randn(3, 8), 4, 4, 0.9))
