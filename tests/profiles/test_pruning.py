"""Similarity of layers, rates, ranks, Wanda and SparseGPT: each against its formula, and their bad input."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from graphwright.errors import InvalidArgument
from graphwright.profiles.cka import cka, gram, redundancy
from graphwright.profiles.layer_rates import LARGEST_RANK, layer_ranks, layer_rates, schedule, spread
from graphwright.profiles.sparsegpt import sparsegpt
from graphwright.profiles.wanda import wanda_mask


def tokens(count: int = 300, k: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, k, generator=generator) @ torch.randn(k, k, generator=generator) / 4


# ---- similarity


def test_cka_is_the_centred_definition():
    inputs = [torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    centre = np.eye(6) - 1 / 6
    grams = [centre @ (f := x.double().flatten(1).numpy()) @ f.T @ centre for x in inputs]
    wanted = [[(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a in grams] for b in grams]
    got = cka([gram(list(x)) for x in inputs])
    # Gram matrices are float32 sums of 32 products.
    assert np.abs(got.numpy() - np.array(wanted)).max() <= 32 * 2**-23
    assert torch.allclose(got.diagonal(), torch.ones(3, dtype=torch.float64))


def test_cka_ignores_rotation_scale_and_shift():
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2))).Q
    similarity = cka([gram(list(x)), gram(list(3 * x @ q + 5))])
    assert abs(float(similarity[0, 1]) - 1) < 1e-4
    assert redundancy(similarity).tolist() == pytest.approx([0.5, 0.5])


def test_a_layer_that_tells_no_text_apart_is_like_none():
    grams = [gram([torch.ones(4)] * 3), gram(list(torch.randn(3, 4)))]
    assert cka(grams)[0].tolist() == [0, 0]


@pytest.mark.parametrize("rows", [[torch.ones(3), torch.ones(4)], [torch.tensor([float("nan")])] * 2])
def test_texts_that_cannot_be_compared_are_refused(rows):
    with pytest.raises(InvalidArgument, match=r"one length|NaN"):
        gram(rows)


# ---- rates and ranks

FEASIBILITY = 1e-7
"""HiGHS's default tolerances, of rates (primal) and of what a change of one would gain (dual)."""


@settings(max_examples=60, deadline=None)
@example(alike=[0.875, 0.25, 0.28125, 0.125], sparsity=0.5, beta=100.0)
@given(
    alike=st.lists(st.floats(0.01, 1), min_size=1, max_size=12, unique=True),
    sparsity=st.just(0.0) | st.floats(1e-3, 0.95),  # the solver takes ranges below its tolerances as infeasible
    beta=st.sampled_from([1.0, 100.0]),
)
def test_rates_solve_the_linear_program(alike, sparsity, beta):
    delta = spread(sparsity)
    rates = layer_rates(alike, sparsity)
    importance = np.exp(-beta * np.array(alike) / sum(alike))
    count = len(alike)
    best = linprog(
        importance,
        A_eq=[[1] * count],
        b_eq=[sparsity * count],
        bounds=[(sparsity - delta, sparsity + delta)] * count,
    )
    assert sum(rates) == pytest.approx(sparsity * count)
    assert all(sparsity - delta - 1e-12 <= rate <= sparsity + delta + 1e-12 for rate in rates)
    missed = FEASIBILITY * (importance.sum() + 2 * delta * count)
    assert importance @ rates == pytest.approx(best.fun, rel=1e-9, abs=missed)


def test_layers_unlike_the_others_get_less_sparsity():
    """First and last layers are the ones that are least like the rest."""
    rates = layer_rates([0.1, 0.3, 0.32, 0.31, 0.12], 0.5)
    assert rates == [0.49, 0.5, 0.51, 0.51, 0.49]


def test_the_schedule_of_five_steps():
    assert [round(schedule(1 - 1e-9, step, 5), 3) for step in range(1, 6)] == [0.488, 0.784, 0.936, 0.992, 1.0]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(InvalidArgument, match="sparsity"):
        schedule(sparsity, 1, 5)
    with pytest.raises(InvalidArgument, match="sparsity"):
        layer_rates([0.1, 0.2], sparsity)


@settings(max_examples=60, deadline=None)
@given(errors=st.lists(st.floats(0, 10), min_size=1, max_size=30), mean=st.integers(1, LARGEST_RANK))
def test_ranks_keep_their_mean_and_follow_the_error(errors, mean):
    ranks = layer_ranks(errors, mean)
    assert sum(ranks) == mean * len(errors)
    assert all(1 <= rank <= LARGEST_RANK for rank in ranks)
    order = sorted(range(len(errors)), key=lambda layer: errors[layer])
    assert all(ranks[a] <= ranks[b] + 1 for a, b in pairwise(order))


# ---- Wanda


def test_wanda_drops_the_least_of_each_row():
    weight, squares = torch.tensor([[1.0, -2.0, 3.0, 4.0], [5.0, 1.0, 1.0, 1.0]]), torch.tensor([100.0, 1.0, 1.0, 1.0])
    assert wanda_mask(weight, squares, 0.5).tolist() == [[True, False, False, True], [True, True, False, False]]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_wanda_zeros_are_exactly_the_share(sparsity):
    mask = wanda_mask(torch.randn(9, 40), torch.rand(40), sparsity)
    assert (~mask).sum(1).tolist() == [int(40 * sparsity)] * 9


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (8, 16)])
def test_wanda_keeps_n_of_m(pattern):
    mask = wanda_mask(torch.randn(6, 32), torch.rand(32), 0.5, pattern)
    assert (mask.view(-1, pattern[1]).sum(1) == pattern[0]).all()


# ---- SparseGPT


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_sparsegpt_errs_less_than_wanda(pattern):
    x, weight = tokens(k=160), torch.randn(24, 160, generator=torch.Generator().manual_seed(3))
    mask = wanda_mask(weight, x.square().sum(0), 0.5, pattern)
    made = sparsegpt(weight, x.T @ x, 0.5, pattern)
    assert (made == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    if pattern is not None:
        assert ((made != 0).view(-1, pattern[1]).sum(1) <= pattern[0]).all()
    errors = [float((x @ (weight - other).T).norm()) for other in (made, weight * mask)]
    assert errors[0] < 0.9 * errors[1]


def test_sparsegpt_makes_up_for_what_it_drops():
    """With its mask alone, and no change of what stays, the error is larger."""
    x, weight = tokens(k=64), torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    made = sparsegpt(weight, x.T @ x, 0.5)
    kept = weight * (made != 0)
    assert (x @ (weight - made).T).norm() < 0.9 * (x @ (weight - kept).T).norm()


def test_sparsegpt_of_nothing_changes_nothing():
    x, weight = tokens(), torch.randn(8, 32)
    assert torch.equal(sparsegpt(weight, x.T @ x, 0.0), weight)


@pytest.mark.parametrize("prune", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("sparsity", "pattern", "reason"),
    [
        (1.2, None, "got a sparsity of 1.2, expected 0 to 1"),
        (-0.1, None, "got a sparsity of -0.1"),
        (0.5, (5, 4), "got n=5 of m=4"),
        (0.5, (8, 24), "blocks of 24 do not divide 32 channels"),
    ],
)
def test_pruning_refuses(prune, sparsity, pattern, reason):
    weight, x = torch.randn(4, 32), tokens()
    function, statistics = (wanda_mask, x.square().sum(0)) if prune == "wanda" else (sparsegpt, x.T @ x)
    with pytest.raises(InvalidArgument, match=reason):
        function(weight, statistics, sparsity, pattern)
