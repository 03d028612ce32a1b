"""The steps of a denoising run: which timesteps they have, and into which ranges methods cut them.

A program knows the step only by the timestep that it is called with, so a range of steps is an interval of timesteps.
Edges lie halfway between neighbouring timesteps: a run of another length with the same schedule is cut at the same
share of its steps, up to one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import InvalidArgument

DEFAULT_TIMESTEPS = tuple(1000.0 * (50 - step) / 50 for step in range(50))
"""50 even steps from 1000 down: the steps of most published video pipelines, over diffusers' range of timesteps."""


class StepRange(BaseModel):
    """A range of steps, `first` to `last`, both included, and the timesteps by which it is recognised."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    first: int
    last: int
    at_least: float | None = None
    at_most: float | None = None

    @property
    def middle(self) -> int:
        """The step in the middle, on which a range is calibrated."""
        return (self.first + self.last) // 2


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
    """The steps in which a method is active, `first` to `stop` (excluded), and `edges` at which it changes."""

    first: int
    stop: int
    edges: tuple[int, ...] = ()


def step_ranges(timesteps: Sequence[float], schedules: Sequence[Schedule]) -> list[StepRange]:
    """Cut a run into ranges in which every method does one thing.

    Args:
        timesteps: Falling, one a step.
        schedules: One a method.

    Returns:
        The ranges in order of the steps, none where no method cuts. Ranges in which no method is active are called
        "dense", and "dense_tail" after the active ones; the others "sparse", or "sparse_1", "sparse_2", ... where there
        are several.
    """
    count = len(timesteps)
    cuts = {edge for schedule in schedules for edge in (schedule.first, schedule.stop, *schedule.edges)}
    starts = [0, *sorted(edge for edge in cuts if 0 < edge < count)]
    active = [start for start in starts if any(schedule.first <= start < schedule.stop for schedule in schedules)]
    if not active:
        return []
    ranges = []
    for first, stop in pairwise([*starts, count]):
        if first in active:
            name = "sparse" if len(active) == 1 else f"sparse_{active.index(first) + 1}"
        else:
            name = "dense" if first < active[0] else "dense_tail" if first > active[-1] else f"dense_{first}"
        low, high = _between(timesteps, stop - 1), _between(timesteps, first - 1)
        ranges.append(StepRange(name=name, first=first, last=stop - 1, at_least=low, at_most=high))
    return ranges


def _between(timesteps: Sequence[float], step: int) -> float | None:
    """The timestep halfway between a step and the next; None before the first and after the last."""
    if not 0 <= step < len(timesteps) - 1:
        return None
    return (timesteps[step] + timesteps[step + 1]) / 2
