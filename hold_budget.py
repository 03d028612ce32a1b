"""Hold a program to its budget: measure it, and roll places back until it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .build import build
from .passes.base import pass_named
from .passes.decision import Decision
from .passes.dialects import run_functional
from .prepare import Prepared
from .profiles.budget import Budget, FrontierPoint, fewest_rollbacks, gains, places_by_harm
from .profiles.measure import output_errors, relative_error
from .profiles.profile import Profile
from .program import Program
from .progress import Progress


def hold_budget(
    prepared: Prepared,
    profile: Profile,
    inputs: Mapping[str, list[list[Any]]],
    short: Mapping[str, list[list[Any]]],
    budget: Budget,
    bar: Progress,
) -> None:
    """Roll back places until the whole program holds the budget; the profile's decisions say which.

    Args:
        prepared: The canonical phases.
        profile: Its proposed decisions; those of places that are rolled back change their status.
        inputs: Flat inputs by phase, on which the whole program is measured.
        short: Shorter ones, on which single sites are probed.
        budget: What may be lost.
        bar: Where progress is shown.
    """
    decisions = profile.decisions
    proposed = [d for d in decisions if d.status == "proposed"]
    name = _widest_phase(prepared, proposed)
    if name is None:
        return
    worst = sorted((d for d in proposed if d.phase == name), key=lambda d: -(d.local_error or 0.0))[: budget.probes]
    with bar.stage("effect on the output", len(worst)):
        errors = output_errors(prepared.exported[name], name, worst, short[name][:1], prepared.shared, bar.step)
    for decision in worst:
        decision.output_error = errors.get(decision.site)

    if budget.evaluate is not None:
        evaluate = budget.evaluate
        baseline = float(evaluate(build(prepared, _with(profile, []))))
        limit = baseline - (budget.max_drop or 0.0)
    else:
        evaluate = _output_error(prepared, inputs)
        baseline, limit = 0.0, -(budget.max_error or 0.0)

    def score(rolled_back: Sequence[str]) -> float:
        bar.step()
        return float(evaluate(build(prepared, _with(profile, _without(decisions, rolled_back)))))

    order = places_by_harm(proposed)
    with bar.stage("hold the budget"):
        count, seen = fewest_rollbacks(order, score, lambda value: value >= limit)
    profile.measured["budget"] = {
        "metric": "evaluate" if budget.evaluate is not None else budget.metric,
        "baseline": baseline,
        "limit": limit,
        "rolled_back": count,
    }
    profile.measured["frontier"] = [
        FrontierPoint(
            rolled_back=number, kept=len(order) - number, score=value, gain=gains(proposed, order[:number]), holds=ok
        ).model_dump()
        for number, value, ok in sorted(seen)
    ]
    for decision in proposed:
        if decision.place in order[:count]:
            decision.status = "rolled_back"
            decision.reason = "the program does not hold the budget with it"


def _output_error(prepared: Prepared, inputs: Mapping[str, list[list[Any]]]) -> Callable[[Program], float]:
    """The largest relative error of any phase's output against the canonical one, negative: higher is better."""
    reference = {
        name: [run_functional(exported, flat) for flat in inputs[name]] for name, exported in prepared.exported.items()
    }

    def evaluate(program: Program) -> float:
        return -max(
            relative_error(phase.exported, reference[name], [run_functional(phase.exported, f) for f in inputs[name]])
            for name, phase in program.phases.items()
        )

    return evaluate


def _widest_phase(prepared: Prepared, proposed: Sequence[Decision]) -> str | None:
    """The phase that computes most at once and sees what is proposed: prefill of a language model, else the last.

    A prefill does not read the state that it leaves, so what changes state alone is seen in the last phase.
    """
    there = {decision.phase for decision in proposed}
    names = [phase.name for phase in prepared.phases if phase.name in there]
    if all(pass_named(d.pass_name, d.options).changes_state for d in proposed):
        return names[-1] if names else None
    return "prefill" if "prefill" in names else (names[-1] if names else None)


def _without(decisions: Sequence[Decision], places: Sequence[str]) -> list[Decision]:
    dropped = set(places)
    return [d for d in decisions if d.place not in dropped]


def _with(profile: Profile, decisions: list[Decision]) -> Profile:
    return profile.model_copy(update={"decisions": decisions})
