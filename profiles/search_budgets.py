"""The evolutionary search for ASTRAEA's budgets: how many tenths of the tokens each step computes, under a total.

Tables that were best so far are the parents; a child takes its steps from two of them, one by one or a span at a time,
some are changed at random, less and less often, and the table is repaired to the total. Half of the first tables are
drawn from what skipping one step alone costs: steps that can be skipped get less.

optuna keeps population, generations and trials; the study can be kept in a file, from which an interrupted search goes
on, and which several processes may share: each takes the next children, until together they have evaluated enough.

Source: ASTRAEA (arXiv 2506.05096), offline search: 50 tables, 30 generations of 30 children, uniform and block
crossover, mutation from 0.1 down to 0.01, repair. How mutation changes a step, and the first tables, are this
implementation's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidArgument
from .study import load_optuna, open_study

Table = tuple[int, ...]
"""Tenths of the tokens, one number a step; the first step is whole."""
FULL = 10


@dataclass(frozen=True)
class Limits:
    """What a table may add up to, in tenths of a step, the whole first one included."""

    steps: int
    least: int
    most: int

    @classmethod
    def of(cls, steps: int, budget: float, slack: tuple[float, float]) -> Limits:
        """The limits of a mean budget.

        Raises:
            InvalidArgument: The first step alone is more.
        """
        total = budget * steps * FULL
        least, most = (int(np.floor(total * part + 1e-9)) for part in slack)
        if steps < 2 or most < FULL:
            raise InvalidArgument(
                f"a budget of {budget} of {steps} steps is less than the first step, which has to be whole"
            )
        return cls(steps, max(least, FULL), most)

    def holds(self, table: Table) -> bool:
        """Whether a table keeps them."""
        return table[0] == FULL and self.least <= sum(table) <= self.most and all(0 <= g <= FULL for g in table)


def repair(table: Sequence[int], limits: Limits, rng: np.random.Generator) -> Table:
    """The table with steps drawn at random changed by a tenth, until it keeps the limits; the first step is whole."""
    genes = np.clip(np.asarray(table, dtype=int), 0, FULL)
    genes[0] = FULL
    while genes.sum() > limits.most:
        genes[rng.choice(1 + np.flatnonzero(genes[1:] > 0))] -= 1
    while genes.sum() < limits.least:
        genes[rng.choice(1 + np.flatnonzero(genes[1:] < FULL))] += 1
    return tuple(int(gene) for gene in genes)


def uniform_table(steps: int, budget: float) -> Table:
    """The table nearest to one budget in all steps but the first, whose total is that of the budget."""
    total = max(int(budget * steps * FULL + 1e-9), FULL)
    rest = np.linspace(0, total - FULL, steps)
    return (FULL, *(int(b) - int(a) for a, b in zip(rest.round()[:-1], rest.round()[1:], strict=True)))


def skipped_table(steps: int, total: int) -> Table:
    """Whole steps, evenly spread, as many as a total of tenths has room for, and a part of one."""
    whole, rest = divmod(total, FULL)
    kept = {round(place) for place in np.linspace(0, steps - 1, whole)} if whole > 1 else {0}
    table = [FULL if step in kept else 0 for step in range(steps)]
    if rest:
        table[table.index(0)] = rest
    return tuple(table)


def random_table(limits: Limits, rng: np.random.Generator) -> Table:
    """Any table that keeps the limits."""
    return repair(rng.integers(0, FULL + 1, limits.steps).tolist(), limits, rng)


def search_budgets(
    evaluate: Callable[[Table], float],
    limits: Limits,
    *,
    parents: int = 50,
    children: int = 30,
    generations: int = 30,
    seed: int = 0,
    study: Path | None = None,
    mark: str = "",
    on_step: Callable[[], None] = lambda: None,
) -> list[tuple[Table, float]]:
    """Search.

    Args:
        evaluate: The error of a table, lower is better.
        limits: What tables may add up to.
        parents: Tables of the first generation, and that survive each one.
        children: Tables of each further generation.
        generations: How many of those there are.
        seed: Of all draws.
        study: File that keeps the study.
        mark: What else the study depends on: the model, the prompts.
        on_step: Called after each evaluation.

    Returns:
        All tables that were evaluated within the limits, best first. What skipping single steps costs was evaluated
        too, and counts: `evaluations` in all.

    Raises:
        InvalidArgument: The file holds the study of another search.
        InvalidFile: It cannot be written.
        MissingExtra: optuna is not installed.
    """
    optuna = load_optuna()
    about = json.dumps([limits.steps, limits.least, limits.most, parents, children, mark])
    opened = open_study("astraea", about, study)
    done = len(_complete(optuna, opened))
    # A process that goes on, or works beside others, must not draw what was drawn already.
    rng = np.random.default_rng([seed, done, len(opened.trials)])
    wanted = evaluations(limits.steps, parents, children, generations) - (limits.steps - 1)
    curve = _curve(opened, evaluate, limits.steps, on_step)
    breeding = _Breeding(optuna, limits, rng, parents, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        opened.sampler = optuna.samplers.NSGAIISampler(
            population_size=children,
            seed=seed + done,
            child_generation_strategy=breeding.child,
            elite_population_selection_strategy=breeding.survivors,
        )
    if not opened.trials:
        for table in _first_tables(limits, curve, parents, rng):
            opened.enqueue_trial(_params(table), skip_if_exists=True)

    def objective(trial: Any) -> float:
        drawn = [FULL, *(trial.suggest_int(_gene(step), 0, FULL) for step in range(1, limits.steps))]
        # The sampler draws the first tables that nobody put into the queue, without regard to the limits.
        table = repair(drawn, limits, rng)
        known = {_table(other, limits.steps): other.value for other in _complete(optuna, opened)}
        value = known[table] if table in known else float(evaluate(table))
        trial.set_user_attr("table", list(table))
        on_step()
        return value

    def stop(running: Any, trial: Any) -> None:
        if len(_complete(optuna, running)) >= wanted:
            running.stop()

    if done < wanted:
        opened.optimize(objective, n_trials=wanted - done, callbacks=[stop])
    found = {_table(trial, limits.steps): float(trial.value) for trial in _complete(optuna, opened)}
    return sorted(found.items(), key=lambda item: (item[1], item[0]))


def evaluations(steps: int, parents: int, children: int, generations: int) -> int:
    """How many tables a search evaluates: the paper's count, what skipping single steps costs within it."""
    return max(parents + children * generations, steps)


class _Breeding:
    """How children are made of parents, and who survives: the strategies of optuna's genetic sampler."""

    def __init__(self, optuna: Any, limits: Limits, rng: np.random.Generator, parents: int, wanted: int) -> None:
        self._optuna, self._limits, self._rng = optuna, limits, rng
        self._parents, self._wanted = parents, wanted
        self._uniform = optuna.samplers.nsgaii.UniformCrossover(swapping_prob=0.5)

    def survivors(self, study: Any, population: list[Any]) -> list[Any]:
        """The best of all, one trial a table."""
        best: dict[Table, Any] = {}
        for trial in sorted(population, key=lambda trial: (trial.value, trial.number)):
            best.setdefault(_table(trial, self._limits.steps), trial)
        return list(best.values())[: self._parents]

    def child(self, study: Any, space: dict[str, Any], parents: list[Any]) -> dict[str, int]:
        """A table that was not tried yet, where some tries find one."""
        tried = [_table(trial, self._limits.steps) for trial in _complete(self._optuna, study)]
        chance = 0.1 + (0.01 - 0.1) * min(len(tried) / max(self._wanted, 1), 1.0)
        known, table = set(tried), ()
        for _ in range(_TRIES):
            table = repair(self._mutated(self._crossed(study, parents), chance).tolist(), self._limits, self._rng)
            if table not in known:
                break
        return {name: value for name, value in _params(table).items() if name in space}

    def _crossed(self, study: Any, parents: list[Any]) -> np.ndarray:
        """Steps of two parents: each from one or the other, or a span from the second."""
        chosen = self._rng.choice(len(parents), 2, replace=len(parents) < 2)
        pair = np.array([_table(parents[int(i)], self._limits.steps) for i in chosen], dtype=float)
        if self._rng.random() < 0.5:
            bounds = np.tile([0.0, FULL], (self._limits.steps, 1))
            legacy = np.random.RandomState(int(self._rng.integers(2**31)))
            return self._uniform.crossover(pair, legacy, study, bounds)
        first, last = sorted(self._rng.integers(1, self._limits.steps, 2))
        return np.concatenate([pair[0, :first], pair[1, first : last + 1], pair[0, last + 1 :]])

    def _mutated(self, genes: np.ndarray, chance: float) -> np.ndarray:
        """Some steps a tenth up or down, or drawn anew."""
        changed = self._rng.random(len(genes)) < chance
        near = genes + self._rng.choice([-1, 1], len(genes))
        anew = self._rng.integers(0, FULL + 1, len(genes))
        return np.where(changed, np.where(self._rng.random(len(genes)) < 0.5, near, anew), genes)


_TRIES = 20
"""How often a child that was tried before is drawn again."""


def _first_tables(limits: Limits, curve: Sequence[float], count: int, rng: np.random.Generator) -> list[Table]:
    """The uniform table, whole steps skipped, and, half and half, random ones and what the curve says, with noise."""
    cost = np.array([0.0, *np.maximum(curve, 0.0)])
    rank = np.argsort(np.argsort(cost)) / max(limits.steps - 1, 1)
    mean = limits.most / limits.steps
    tables = [repair(uniform_table(limits.steps, mean / FULL), limits, rng)]
    tables.append(repair(skipped_table(limits.steps, limits.most), limits, rng))
    for number in range(count - 2):
        if number % 2:
            tables.append(random_table(limits, rng))
        else:
            spread = FULL * (0.4 + 0.8 * rng.random())
            noise = rng.normal(0, 0.5 + 2 * number / count, limits.steps)
            tables.append(repair(np.rint(mean + spread * (rank - rank.mean()) + noise).tolist(), limits, rng))
    return tables


def _curve(opened: Any, evaluate: Callable[[Table], float], steps: int, on_step: Callable[[], None]) -> list[float]:
    """What skipping each step alone costs; kept in the study, so that it is evaluated once."""
    found = []
    for step in range(1, steps):
        name = f"skip{step}"
        if name not in opened.user_attrs:
            table = tuple(0 if other == step else FULL for other in range(steps))
            opened.set_user_attr(name, float(evaluate(table)))
            on_step()
        found.append(float(opened.user_attrs[name]))
    return found


def _gene(step: int) -> str:
    return f"step{step}"


def _params(table: Table) -> dict[str, int]:
    return {_gene(step): value for step, value in enumerate(table) if step}


def _table(trial: Any, steps: int) -> Table:
    """The table that was evaluated, which may have been repaired."""
    stored = trial.user_attrs.get("table")
    return tuple(stored) if stored else (FULL, *(int(trial.params[_gene(step)]) for step in range(1, steps)))


def _complete(optuna: Any, study: Any) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
