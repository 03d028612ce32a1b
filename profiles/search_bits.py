"""The search for one pair a group: least objective and least mean bits, under a limit on the mean bits.

NSGA-II (optuna) over one integer a group, from uniform tables and from those that the layers' own errors say are good.
Tables that were tried are not evaluated again, and do not count. The study can be kept in a file, from which an
interrupted search goes on.

Source: KVTuner (Li et al. 2025, arXiv 2502.04420), section 5.4: multi-objective search, constraint mean bits <= limit.
The tables to start from are this implementation's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidArgument
from .cache_groups import Group, mean_bits
from .cache_sensitivity import Pair
from .study import load_optuna, open_study

Sampler = Literal["nsga2", "random"]
Table = tuple[Pair, ...]
"""One pair a layer."""


@dataclass(frozen=True)
class Trial:
    """One table that was evaluated."""

    table: Table
    bits: float
    objective: float


def search_bits(
    groups: Sequence[Group],
    evaluate: Callable[[Table], float],
    *,
    limit: float,
    trials: int,
    seed: int,
    sampler: Sampler = "nsga2",
    starts: Sequence[Sequence[int]] = (),
    study: Path | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Try tables.

    Args:
        groups: The choices.
        evaluate: The objective of a table, lower is better.
        limit: Most mean bits of a table that may be chosen; others are tried too, they show the way.
        trials: Different tables that are evaluated, those that `study` holds included; fewer where there are no more or
            the sampler finds none.
        seed: Of the sampler.
        sampler: "random" draws all tables at random, for comparison.
        starts: Tables to begin with beside uniform ones, as a place among the candidates for each group, by rising
            bits: the last within the limit, and of the others some of all sizes.
        study: File that keeps the study.
        on_step: Called after each trial.

    Returns:
        The evaluated tables, in order.

    Raises:
        InvalidArgument: No table keeps the limit, or the file holds the study of another search.
        MissingExtra: optuna is not installed.
    """
    least = sum(min(map(mean_bits, group.candidates)) * len(group.layers) for group in groups)
    layers = sum(len(group.layers) for group in groups)
    if least / layers > limit:
        raise InvalidArgument(f"no table has {limit} mean bits; the least is {least / layers:.2f}")
    opened = _open(groups, sampler, seed, study)
    known = {_table(groups, t.params): t.values[0] for t in opened.trials if t.values is not None}

    def objective(trial: Any) -> tuple[float, float]:
        choices = {f"group{n}": trial.suggest_int(f"group{n}", 0, len(g.candidates) - 1) for n, g in enumerate(groups)}
        table = _table(groups, choices)
        trial.set_constraint("bits", table_bits(table) - limit)
        if table not in known:
            known[table] = float(evaluate(table))
            on_step()
        if len(known) >= trials:
            opened.stop()
        return known[table], table_bits(table)

    if not opened.trials and sampler != "random":
        within = [t for t in starts if table_bits(_table(groups, _choices(t))) <= limit]
        for choices in [*map(_choices, within[-1:]), *_uniform(groups), *_spread(starts, trials // 4)]:
            opened.enqueue_trial(choices, skip_if_exists=True)
    if len(known) < trials:
        opened.optimize(objective, n_trials=_PATIENCE * trials)
    return [Trial(table, table_bits(table), value) for table, value in known.items()]


def table_bits(table: Table) -> float:
    """Mean bits of a table."""
    return sum(map(mean_bits, table)) / len(table)


def best_trial(trials: Sequence[Trial], limit: float) -> Trial:
    """The trial with the least objective within the limit, of equal ones that with the fewest bits.

    Raises:
        InvalidArgument: None is within the limit.
    """
    within = [trial for trial in trials if trial.bits <= limit + 1e-9]
    if not within:
        raise InvalidArgument(f"none of {len(trials)} trials has at most {limit} mean bits; try more trials")
    return min(within, key=lambda trial: (trial.objective, trial.bits))


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other one beats in bits and objective, by rising bits; one of each table."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.bits, trial.objective)):
        if not front or trial.objective < front[-1].objective:
            front.append(trial)
    return front


def _table(groups: Sequence[Group], choices: dict[str, int]) -> Table:
    found = {
        layer: group.candidates[choices[f"group{number}"]]
        for number, group in enumerate(groups)
        for layer in group.layers
    }
    return tuple(found[layer] for layer in sorted(found))


def _uniform(groups: Sequence[Group]) -> list[dict[str, int]]:
    """The tables nearest to one pair for all layers: where the search starts."""
    pairs = sorted({pair for group in groups for pair in group.candidates}, key=lambda pair: (-mean_bits(pair), pair))
    return [{f"group{n}": _nearest(group.candidates, pair) for n, group in enumerate(groups)} for pair in pairs]


def _spread(starts: Sequence[Sequence[int]], most: int) -> list[dict[str, int]]:
    """At most so many of the tables, evenly from all of them."""
    count = min(most, len(starts))
    chosen = [starts[(2 * n + 1) * len(starts) // (2 * count)] for n in range(count)]
    return [_choices(table) for table in chosen]


def _choices(table: Sequence[int]) -> dict[str, int]:
    """A place among the candidates for each group, as the study names it."""
    return {f"group{n}": choice for n, choice in enumerate(table)}


def _nearest(candidates: Sequence[Pair], pair: Pair) -> int:
    distances = [(abs(mean_bits(other) - mean_bits(pair)), other != pair) for other in candidates]
    return distances.index(min(distances))


def _open(groups: Sequence[Group], sampler: Sampler, seed: int, path: Path | None) -> Any:
    """The study, with its sampler."""
    about = json.dumps([[group.layers, group.candidates] for group in groups])
    study = open_study("kvtuner", about, path, objectives=2)
    samplers = load_optuna().samplers

    # A resumed study must not draw the same numbers again.
    seed += 1000 * len(study.trials)
    if sampler == "random":
        study.sampler = samplers.RandomSampler(seed=seed)
    else:
        study.sampler = samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
    return study


_POPULATION = 20
"""Five generations in 100 trials; optuna's 50 would be two."""
_PATIENCE = 4
"""How many tables are drawn, for each one that is to be evaluated, before the search ends."""
