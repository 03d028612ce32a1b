"""The steps of a denoising run: which timesteps they have, and into which ranges methods cut them.

A program knows the step only by the timestep that it is called with, so a range of steps is an interval of timesteps.
Edges lie halfway between neighbouring timesteps: a run of another length with the same schedule is cut at the same
share of its steps, up to one step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


def step_ranges(
    timesteps: Sequence[float], edges: Collection[int], sparse_from: int, sparse_to: int
) -> list[StepRange]:
    """Cut a run into ranges.

    Args:
        timesteps: Falling, one a step.
        edges: Steps at which a range begins, in any order; step 0 always does.
        sparse_from: The first step at which any method is active.
        sparse_to: The step from which on no method is active again; the number of steps where there is none.

    Returns:
        The ranges in order of the steps. Those before `sparse_from` and from `sparse_to` on are called "dense" and
        "dense_tail", the others "sparse", or "sparse_1", "sparse_2", ... where there are several.
    """
    count = len(timesteps)
    inside = {edge for edge in (*edges, sparse_from, sparse_to) if 0 < edge < count}
    starts = [0, *sorted(inside)]
    ends = [*(start - 1 for start in starts[1:]), count - 1]
    active = [start for start in starts if sparse_from <= start < sparse_to]
    ranges = []
    for first, last in zip(starts, ends, strict=True):
        if first in active:
            name = "sparse" if len(active) == 1 else f"sparse_{active.index(first) + 1}"
        else:
            name = "dense" if first < sparse_from else "dense_tail"
        ranges.append(
            StepRange(
                name=name,
                first=first,
                last=last,
                at_least=_between(timesteps, last),
                at_most=_between(timesteps, first - 1),
            )
        )
    return ranges


def _between(timesteps: Sequence[float], step: int) -> float | None:
    """The timestep halfway between a step and the next; None before the first and after the last."""
    if not 0 <= step < len(timesteps) - 1:
        return None
    return (timesteps[step] + timesteps[step + 1]) / 2
