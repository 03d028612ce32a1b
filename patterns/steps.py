"""The steps of a denoising run: which timesteps they have, and into which ranges methods cut them.

A program knows the step only by the timestep that it is called with, so a range of steps is an interval of timesteps.
Edges lie halfway between neighbouring timesteps: a run of another length with the same schedule is cut at the same
share of its steps, up to one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import InvalidArgument

DEFAULT_TIMESTEPS = tuple(1000.0 * (50 - step) / 50 for step in range(50))
"""50 even steps from 1000 down: the steps of most published video pipelines, over diffusers' range of timesteps."""


class StepSpan(BaseModel):
    """Steps `first` to `last`, both included, and the timesteps by which they are recognised."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int
    last: int
    at_least: float | None = None
    at_most: float | None = None


class StepRange(StepSpan):
    """A range of steps that one phase runs, and further ones that it runs as well."""

    name: str
    more: tuple[StepSpan, ...] = ()

    @property
    def steps(self) -> list[int]:
        """All of its steps."""
        return [step for span in (self, *self.more) for step in range(span.first, span.last + 1)]

    @property
    def middle(self) -> int:
        """The step in the middle, on which a range is calibrated."""
        return self.steps[(len(self.steps) - 1) // 2]


def checked_timesteps(timesteps: Sequence[float] | Tensor) -> list[float]:
    """Timesteps as floats.

    Raises:
        InvalidArgument: There is none, or they do not fall.
    """
    values = [float(value) for value in timesteps]
    if not values:
        raise InvalidArgument("timesteps are empty")
    rising = next((i for i, (a, b) in enumerate(pairwise(values)) if not b < a), None)
    if rising is not None:
        raise InvalidArgument(
            f"timesteps must fall from step to step, got {values[rising]:g} and then {values[rising + 1]:g}"
        )
    return values


@dataclass(frozen=True)
class Schedule:
    """The steps in which a method is active, `first` to `stop` (excluded), and `edges` at which it changes.

    `labels` says of each step what the method does there: steps of one label run in one phase, wherever they are.
    """

    first: int
    stop: int
    edges: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    def label(self, step: int) -> int:
        """What the method does in a step: its label, or where it has none the number of the range between edges."""
        if not self.first <= step < self.stop:
            return -1
        return self.labels[step] if self.labels else sum(edge <= step for edge in self.edges)


def step_ranges(timesteps: Sequence[float], schedules: Sequence[Schedule]) -> list[StepRange]:
    """Cut a run into ranges in which every method does one thing.

    Args:
        timesteps: Falling, one a step.
        schedules: One a method.

    Returns:
        The ranges by their first steps, none where no method cuts. Ranges in which no method is active are called
        "dense", and "dense_tail" after the active ones; the others "sparse", or "sparse_1", "sparse_2", ... where there
        are several.
    """
    count = len(timesteps)
    labels = [tuple(schedule.label(step) for schedule in schedules) for step in range(count)]
    starts = [step for step in range(count) if not step or labels[step] != labels[step - 1]]
    spans = [(first, stop) for first, stop in pairwise([*starts, count])]
    active = [first for first, _ in spans if any(label >= 0 for label in labels[first])]
    if not active:
        return []
    has_labels = any(schedule.labels for schedule in schedules)
    groups: dict[Any, list[tuple[int, int]]] = {}
    for first, stop in spans:
        # Without labels a range is a phase; so are dense steps, whose names say where they stand.
        groups.setdefault(labels[first] if has_labels and first in active else first, []).append((first, stop))
    sparse = [group for group in groups.values() if group[0][0] in active]
    ranges = []
    for group in groups.values():
        first = group[0][0]
        if group in sparse:
            name = "sparse" if len(sparse) == 1 else f"sparse_{sparse.index(group) + 1}"
        else:
            name = "dense" if first < active[0] else "dense_tail" if first > active[-1] else f"dense_{first}"
        own, *more = (_span(timesteps, *span) for span in group)
        ranges.append(StepRange(name=name, **own.model_dump(), more=tuple(more)))
    return ranges


def _span(timesteps: Sequence[float], first: int, stop: int) -> StepSpan:
    low, high = _between(timesteps, stop - 1), _between(timesteps, first - 1)
    return StepSpan(first=first, last=stop - 1, at_least=low, at_most=high)


def _between(timesteps: Sequence[float], step: int) -> float | None:
    """The timestep halfway between a step and the next; None before the first and after the last."""
    if not 0 <= step < len(timesteps) - 1:
        return None
    return (timesteps[step] + timesteps[step + 1]) / 2
