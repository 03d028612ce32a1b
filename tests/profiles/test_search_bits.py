"""Pruning, clustering and the search, on sensitivities and objectives that are known."""

from __future__ import annotations

import math
from itertools import product

import pytest

from graphwright.errors import InvalidArgument, InvalidFile
from graphwright.profiles.cache_groups import Group, group_layers, mean_bits, pareto_pairs, predicted_choices
from graphwright.profiles.cache_sensitivity import PAIRS, Sensitivity
from graphwright.profiles.front_picture import draw_front
from graphwright.profiles.search_bits import Trial, best_trial, pareto_front, search_bits, table_bits

PAPER = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
"""The pairs that stay in most layers (KVTuner, section 5.2)."""


def layer(place: str, size: float = 1.0, keys: float = 10.0) -> Sensitivity:
    """A layer whose keys cost `keys` times what its values cost."""
    step = {8: 1 / 255, 4: 1 / 15, 2: 1 / 3}
    errors = {(k, v): [size * (keys * step[k] ** 2 + step[v] ** 2) ** 0.5] for k, v in PAIRS}
    return Sensitivity(place, errors, {})


def test_the_pairs_of_the_paper_stay_where_keys_matter_more():
    assert pareto_pairs(layer("a")) == PAPER
    assert pareto_pairs(layer("a", keys=0.1)) == ((8, 8), (4, 8), (4, 4), (2, 4), (2, 2))


def test_equal_pairs_beat_none_of_each_other():
    errors = {pair: [1.0] for pair in PAIRS}
    assert pareto_pairs(Sensitivity("a", errors, {})) == ((2, 2),)


def test_groups_hold_layers_that_are_alike():
    layers = [layer("0", 50), layer("1"), layer("2", 1.05), layer("3", keys=0.1), layer("4", 0.95), layer("5", 8)]
    groups = group_layers(layers, 4)
    assert [group.layers for group in groups] == [(0,), (1, 2, 4), (3,), (5,)]
    assert groups[0].candidates == PAPER
    assert groups[2].candidates != PAPER, "layers of different candidates are never one group"
    merged = group_layers(layers, 3)
    assert len(merged) == 3
    assert sorted(number for group in merged for number in group.layers) == list(range(6))
    assert len(group_layers(layers, 1)) == 2, "two sets of candidates are two groups at least"
    assert len(group_layers(layers, 99)) == 6


GROUPS = [Group((0,), PAPER), Group((1, 3), PAPER), Group((2, 4, 5), PAPER)]
SIZES = (10.0, 3.0, 1.0, 3.0, 1.0, 1.0)
LAYERS = [layer(str(number), size) for number, size in enumerate(SIZES)]
TRUTH = (10.0, 1.5, 1.0, 3.5, 2.0, 0.6)
"""What the layers really weigh in the whole: near what their own errors say, and not the same."""


def cost(table) -> float:
    """Errors of layers add up in squares."""
    weighed = zip(LAYERS, TRUTH, SIZES, table, strict=True)
    return sum((weight / size * layer.error(pair)) ** 2 for layer, weight, size, pair in weighed)


def exhaustive(limit: float) -> float:
    tables = []
    for a in PAPER:
        for b in PAPER:
            for c in PAPER:
                tables.append((a, b, c, b, c, c))
    return min(cost(table) for table in tables if table_bits(table) <= limit)


@pytest.mark.parametrize("limit", [3.5, 4.0, 5.0])
def test_the_search_finds_the_best_table(limit):
    starts = predicted_choices(GROUPS, LAYERS)
    trials = search_bits(GROUPS, cost, limit=limit, trials=60, seed=0, starts=starts)
    chosen = best_trial(trials, limit)
    assert len(trials) == len({trial.table for trial in trials}) == 60
    assert chosen.bits <= limit
    assert cost(chosen.table) == chosen.objective
    assert chosen.objective <= 1.05 * exhaustive(limit), "60 of 125 tables"
    assert table_bits(chosen.table) == pytest.approx(sum(map(mean_bits, chosen.table)) / 6)


def test_tables_are_evaluated_once_and_uniform_ones_first():
    seen = []

    def counted(table) -> float:
        seen.append(table)
        return cost(table)

    trials = search_bits(GROUPS, counted, limit=4, trials=60, seed=1)
    assert len(seen) == len(set(seen)) <= 60
    assert [trial.table for trial in trials[:5]] == [(pair,) * 6 for pair in PAPER]


def test_a_search_goes_on_where_it_was_interrupted(tmp_path):
    study = tmp_path / "study.log"
    seen = []

    def interrupted(table) -> float:
        if len(seen) == 12:
            raise KeyboardInterrupt
        seen.append(table)
        return cost(table)

    with pytest.raises(KeyboardInterrupt):
        search_bits(GROUPS, interrupted, limit=4, trials=40, seed=0, study=study)
    again = []

    def resumed(table) -> float:
        again.append(table)
        return cost(table)

    trials = search_bits(GROUPS, resumed, limit=4, trials=40, seed=0, study=study)
    assert len(trials) == 40
    assert not set(again) & set(seen)
    assert not search_bits(GROUPS, resumed, limit=4, trials=40, seed=0, study=study)[40:]
    with pytest.raises(InvalidArgument, match="holds the study of another search"):
        search_bits(GROUPS[:2], cost, limit=4, trials=5, seed=0, study=study)
    with pytest.raises(InvalidFile, match="there is no such folder"):
        search_bits(GROUPS, cost, limit=4, trials=5, seed=0, study=tmp_path / "none" / "study.log")


def hypervolume(trials: list[Trial]) -> float:
    """The area between the front and the corner (8 bits, the cost of 2 bits everywhere), with costs by logarithm."""
    worst, area, last = math.log(cost([(2, 2)] * 6)), 0.0, None
    for trial in pareto_front(trials):
        if last is not None:
            area += (trial.bits - last.bits) * (worst - math.log(last.objective))
        last = trial
    assert last is not None
    return area + (8 - last.bits) * (worst - math.log(last.objective))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_front_is_better_than_that_of_random_tables(seed):
    groups = [Group((n,), PAPER) for n in range(6)]
    starts = predicted_choices(groups, LAYERS)
    found = {
        sampler: hypervolume(search_bits(groups, cost, limit=4, trials=60, seed=seed, sampler=sampler, starts=starts))
        for sampler in ("nsga2", "random")
    }
    assert found["nsga2"] > found["random"]


def test_predicted_tables_are_the_best_of_their_size():
    layers = [layer("0", 50), layer("1"), layer("2", 8)]
    groups = [Group((n,), pareto_pairs(each)) for n, each in enumerate(layers)]
    tables = [tuple(g.candidates[i] for g, i in zip(groups, t, strict=True)) for t in predicted_choices(groups, layers)]
    assert tables[0] == ((2, 2),) * 3
    assert tables[-1] == ((8, 8),) * 3
    assert len(tables) > 6

    def squares(table) -> float:
        return sum(each.error(pair) ** 2 for each, pair in zip(layers, table, strict=True))

    every = list(product(PAPER, repeat=3))
    for table in tables:
        assert squares(table) == min(squares(other) for other in every if table_bits(other) <= table_bits(table))


def test_limits_that_no_table_keeps_are_refused():
    with pytest.raises(InvalidArgument, match=r"no table has 1.5 mean bits; the least is 2.00"):
        search_bits(GROUPS, cost, limit=1.5, trials=5, seed=0)
    with pytest.raises(InvalidArgument, match=r"none of 1 trials has at most 3 mean bits"):
        best_trial([Trial(((8, 8),), 8.0, 0.1)], 3)


def test_the_front_is_what_nothing_beats(tmp_path):
    trials = [
        Trial(((k, v),), (k + v) / 2, value)
        for (k, v), value in zip(
            ((8, 8), (8, 4), (4, 8), (4, 4), (4, 4), (2, 2)), (1.0, 2.0, 5.0, 3.0, 3.0, 9.0), strict=True
        )
    ]
    front = pareto_front(trials)
    assert [(t.bits, t.objective) for t in front] == [(2, 9.0), (4, 3.0), (6, 2.0), (8, 1.0)]
    draw_front(trials, front[1], 4.0, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InvalidFile, match="cannot be written"):
        draw_front(trials, front[1], 4.0, tmp_path / "none" / "front.png")
