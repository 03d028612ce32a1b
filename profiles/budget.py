"""Quality budgets: which of the proposed rewrites a program can afford.

1. Every proposal is measured at its site: error on equal inputs, time before and after (`measure_sites`). A variant
   that is slower than what it replaces is dropped, unless the user keeps what is smaller.
2. The sites with the largest errors are rewritten alone, and the program's output is compared (`output_errors`).
3. All proposals are applied. If the whole program does not hold the budget, places are rolled back, those with the most
   error for their gain first, until it does. The number is found by doubling and then halving, since more rollbacks
   never hurt quality in expectation; every step is a measurement of the whole program and is kept as the frontier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import InvalidArgument
from ..passes.decision import Decision


class Budget(BaseModel):
    """How much quality a program may lose.

    Give `max_error` (relative L2 distance of the outputs on the calibration inputs), or `evaluate` with `max_drop`.

    Attributes:
        max_error: Largest relative L2 error of the program's output.
        metric: What `max_error` measures.
        evaluate: Your metric of a program, higher is better, called with a `Program`.
        max_drop: How much lower than the canonical program's the metric may be.
        probes: How many sites are rewritten alone to see their effect on the output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    max_error: float | None = Field(None, gt=0)
    metric: Literal["relative_l2"] = "relative_l2"
    evaluate: Callable[[Any], float] | None = None
    max_drop: float | None = Field(None, ge=0)
    probes: int = Field(256, ge=0)

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            path = "".join(f"{part}: " for part in first["loc"])
            raise InvalidArgument(f"Budget: {path}{first['msg'].removeprefix('Value error, ')}") from error

    @model_validator(mode="after")
    def _one_kind(self) -> Budget:
        if (self.evaluate is None) != (self.max_drop is None):
            raise ValueError("evaluate and max_drop go together")
        if (self.max_error is None) == (self.evaluate is None):
            raise ValueError("give either max_error, or evaluate with max_drop")
        return self


class FrontierPoint(BaseModel):
    """One measurement of the whole program: how many places were rolled back, what it scored, what gain was left."""

    rolled_back: int
    kept: int
    score: float
    gain: float
    holds: bool


def places_by_harm(decisions: Sequence[Decision]) -> list[str]:
    """Places in the order in which they are to be rolled back: most error for their gain first.

    Errors of different sites add up in squares, so a place's harm is its squared error; where the effect on the output
    was not measured it is estimated from the local error, with the median ratio of the sites where both are known.
    """
    both = sorted(d.output_error / d.local_error for d in decisions if d.output_error is not None and d.local_error)
    ratio = both[len(both) // 2] if both else 1.0
    measured: dict[str, float] = {}
    estimated: dict[str, float] = {}
    gain: dict[str, float] = {}
    for decision in decisions:
        place = decision.place
        gain[place] = gain.get(place, 0.0) + (decision.predicted_gain or 0.0)
        if decision.output_error is not None:
            measured[place] = max(measured.get(place, 0.0), decision.output_error)
        estimated[place] = max(estimated.get(place, 0.0), (decision.local_error or 0.0) * ratio)
    harm = {place: measured.get(place, estimate) ** 2 for place, estimate in estimated.items()}
    return sorted(harm, key=lambda place: (-harm[place] / max(gain[place], 1e-12), place))


def fewest_rollbacks(
    places: Sequence[str], score: Callable[[Sequence[str]], float], holds: Callable[[float], bool]
) -> tuple[int, list[tuple[int, float, bool]]]:
    """The least number of places, from the front of `places`, that must be rolled back for the budget to hold.

    Args:
        places: In order of rollback.
        score: Measures the program with these places rolled back.
        holds: Whether a score keeps the budget.

    Returns:
        The number, and every measurement: (number, score, whether it holds). Rolling back everything holds by
        definition and is not measured.
    """
    seen: list[tuple[int, float, bool]] = []

    def good(count: int) -> bool:
        if count >= len(places):
            return True
        value = score(places[:count])
        seen.append((count, value, holds(value)))
        return seen[-1][2]

    if good(0):
        return 0, seen
    low, high = 0, 1
    while not good(high):
        low, high = high, min(2 * high, len(places))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high, seen


def gains(decisions: Sequence[Decision], without: Sequence[str] = ()) -> float:
    """Share of the arithmetic, summed over phases and divided by their number, that the kept decisions cover."""
    dropped = set(without)
    phases: Mapping[str, list[float]] = {}
    for decision in decisions:
        values = phases.setdefault(decision.phase, [])  # pyright: ignore[reportAttributeAccessIssue]
        if decision.place not in dropped and decision.status in ("proposed", "kept"):
            values.append(decision.predicted_gain or 0.0)
    return sum(sum(values) for values in phases.values()) / max(len(phases), 1)
