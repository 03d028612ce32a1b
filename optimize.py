"""The one call: capture, canonicalize, match, decide, rewrite.

The data's way reads from top to bottom in `optimize`; each step is a function of this file or of the folder that
answers its question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from .capture import Captured, capture
from .errors import InvalidArgument, InvalidType, VerificationError
from .passes.assume_empty_cache import AssumeEmptyCache
from .passes.base import pass_named
from .passes.canonicalize import canonicalize
from .passes.decision import Decision
from .passes.dialects import TOLERANCE, largest_difference, run_functional
from .passes.edit import copy_exported
from .passes.fix_sizes import FixSizes
from .passes.manager import PassManager, PassRecord
from .passes.merge_duplicates import MergeDuplicates
from .passes.rewrite import apply_decisions
from .patterns.find import Sites, find_sites
from .patterns.graph import GraphView
from .patterns.text import graph_text
from .phases import Phase, PhasePlan, state_of
from .profiles.budget import Budget, FrontierPoint, fewest_rollbacks, gains, places_by_harm
from .profiles.calibration import calibration_inputs
from .profiles.measure import measure_sites, output_errors, relative_error
from .profiles.method import Context, Method, method_named
from .profiles.profile import Profile, data_hash, fingerprint, hardware, versions
from .program import History, Program
from .progress import Progress
from .report import Inspection
from .torch_private import pytree

TARGETS = ("eager",)
PROBE_TOKENS = 64
"""Tokens of a text on which single sites are probed: enough to rank them, and short."""
Keep = Literal["faster", "smaller"]


def optimize(
    model: nn.Module | ExportedProgram | str | Path | Captured,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    methods: Sequence[Method | str] = (),
    profile: Profile | str | Path | None = None,
    calibration: Iterable[Any] | None = None,
    budget: Budget | None = None,
    target: str = "eager",
    mesh: Any = None,
    keep: Keep = "faster",
    progress: bool = True,
) -> Program:
    """Rewrite a model as methods or a profile decide, within a quality budget.

    Args:
        model: A module, an exported program, a path to `.pt2`, or what a `capture_*` function returned.
        args: Example positional inputs of a module.
        kwargs: Example keyword inputs of a module.
        dynamic_shapes: As in `torch.export.export`.
        methods: Methods or their names, in order. With neither methods nor profile the result is the canonical program.
        profile: Decisions to replay instead of searching.
        calibration: `(args, kwargs)` items, or token tensors for language models; the example inputs by default.
        budget: How much quality may be lost; without one every variant that is not slower is kept.
        target: What to lower to; "eager".
        mesh: Not supported yet; must be None.
        keep: "faster" drops variants measured slower than what they replace, "smaller" keeps them for their memory.
        progress: Show progress on a terminal.

    Returns:
        The program, called like the model.

    Raises:
        GraphwrightError: One of its subclasses; see `errors.py`.

    Example:
        >>> program = gw.optimize(gw.capture_causal_lm(model, 512), methods=[gw.Int8()], calibration=texts)
        >>> print(program.report())
    """
    _check_arguments(methods, profile, budget, target, mesh, keep)
    chosen = [method_named(method) if isinstance(method, str) else method for method in methods]
    with Progress(progress) as bar:
        with bar.stage("capture"):
            captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        with bar.stage("canonicalize"):
            prepared = prepare(captured)
        found = fingerprint(prepared.exported)
        if profile is not None:
            with bar.stage("replay"):
                return _replay(prepared, profile if isinstance(profile, Profile) else Profile.load(profile), found)
        items = None if calibration is None else list(islice(calibration, 8))
        inputs = calibration_inputs(prepared.exported, captured.kind, captured.facts, items)
        context = Context(prepared.exported, prepared.sites, inputs, captured.facts, progress=bar)
        decisions = [decision for method in chosen for decision in method.decide(context)]
        _refuse_conflicts(decisions)
        prepared.shared.update(context.tensors)
        prepared = with_exact(prepared, decisions)
        result = Profile(
            fingerprint=found,
            methods=[{"name": method.name, "options": method.model_dump(mode="json")} for method in chosen],
            decisions=decisions,
            versions=versions(),
            hardware=hardware(),
            data=data_hash(flat for items in inputs.values() for flat in items),
        )
        result.tensors.update(context.tensors)
        if chosen:
            with bar.stage("measure"):
                _measure(prepared, decisions, inputs, keep)
            if budget is not None:
                short = calibration_inputs(
                    prepared.exported, captured.kind, captured.facts, items, longest=PROBE_TOKENS
                )
                _hold_budget(prepared, result, inputs, short, budget, bar)
        with bar.stage("rewrite"):
            return _build(prepared, result)


@dataclass
class Prepared:
    """Canonical phases with their sites, before anything lossy.

    Attributes:
        captured: Where they came from.
        phases: In the order in which their conditions are tried.
        sites: Phase -> sites.
        records: What the exact passes did.
        shared: Tensors that rewrites make once for all phases.
    """

    captured: Captured
    phases: list[Phase]
    sites: dict[str, Sites]
    records: list[PassRecord]
    shared: dict[str, Tensor] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def exported(self) -> dict[str, ExportedProgram]:
        """Phase -> canonical program."""
        return {phase.name: phase.exported for phase in self.phases}


def prepare(captured: Captured) -> Prepared:
    """Canonicalize a captured program and specialise it into its phases.

    Args:
        captured: What capture returned; it is not changed.

    Returns:
        The phases, which share all tensors.

    Raises:
        VerificationError: A pass broke an invariant.
    """
    started = time.perf_counter()
    base = copy_exported(captured.exported)
    shared: dict[str, Tensor] = {}
    records = canonicalize(base, "captured", shared)
    phases = [Phase(plan, _specialise(base, plan, shared, records)) for plan in captured.plans]
    sites = {phase.name: find_sites(GraphView(phase.exported), phase.name) for phase in phases}
    prepared = Prepared(captured, phases, sites, records, shared)
    prepared.measured["prepare_seconds"] = time.perf_counter() - started
    return prepared


def with_exact(prepared: Prepared, decisions: Sequence[Decision]) -> Prepared:
    """Apply the decisions whose passes are exact, and find the sites anew: what is lossy is chosen on the result.

    Args:
        prepared: Canonical phases; they are not changed.
        decisions: All decisions; the exact ones among those that are proposed or kept become kept.

    Raises:
        InvalidArgument: One cannot be applied. Others build on it, and phases share what it changes, so none may fail.
    """
    exact = [d for d in decisions if d.status in ("proposed", "kept") and is_exact(d)]
    if not exact:
        return prepared
    phases = []
    for phase in prepared.phases:
        exported = copy_exported(phase.exported)
        rewriting = apply_decisions(exported, phase.name, exact, prepared.shared)
        for site, reason in rewriting.failed.items():
            raise InvalidArgument(f"{site} cannot be rewritten as decided: {reason}")
        rewriting.commit()
        phases.append(Phase(phase.plan, exported))
    for decision in exact:
        decision.status = "kept"
    sites = {phase.name: find_sites(GraphView(phase.exported), phase.name) for phase in phases}
    return replace(prepared, phases=phases, sites=sites)


def is_exact(decision: Decision) -> bool:
    """Whether a decision's pass leaves the numbers as they are."""
    return bool(pass_named(decision.pass_name, decision.options).exact)


def _specialise(
    base: ExportedProgram, plan: PhasePlan, shared: dict[str, Tensor], records: list[PassRecord]
) -> ExportedProgram:
    exported = copy_exported(base)
    if plan.sizes:
        records += PassManager([FixSizes(sizes=plan.sizes)]).run(exported, plan.name, shared)
        _check_same(base, exported, plan.name)
        records += canonicalize(exported, plan.name, shared)
    if plan.start_input is not None:
        passes = [AssumeEmptyCache(start_input=plan.start_input), MergeDuplicates()]
        records += PassManager(passes).run(exported, plan.name, shared)
    return exported


def _check_same(base: ExportedProgram, fixed: ExportedProgram, phase: str) -> None:
    """Fixed sizes must compute what the dynamic program computes at those sizes."""
    if fixed.example_inputs is None:
        return
    flat = pytree.tree_leaves(fixed.example_inputs)
    difference = largest_difference(run_functional(base, flat), run_functional(fixed, flat))
    if not difference <= max(TOLERANCE.values()):
        raise VerificationError(f"{phase}: fixing the sizes changed the outputs by {difference:.2g}")


def _measure(prepared: Prepared, decisions: list[Decision], inputs: Mapping[str, list[list[Any]]], keep: Keep) -> None:
    """Error and time of every proposal at its own site; what is slower is refused."""
    started = time.perf_counter()
    least: dict[Any, float] = {}
    for phase in prepared.phases:
        proposals = [d for d in decisions if d.phase == phase.name and d.status == "proposed"]
        flat = inputs.get(phase.name, [])
        if not proposals or not flat:
            continue
        measured, failed = measure_sites(phase.exported, phase.name, proposals, flat[:1], prepared.shared, least)
        for decision in proposals:
            measure = measured.get(decision.site)
            if measure is None:
                decision.status, decision.reason = "failed", failed.get(decision.site, "could not be measured")
                continue
            decision.local_error, decision.measured_gain = measure.error, measure.gain
    if keep == "faster":
        _refuse_slower(decisions)
    prepared.measured["measure_seconds"] = time.perf_counter() - started


def _refuse_slower(decisions: list[Decision]) -> None:
    for decision in decisions:
        gain = decision.measured_gain
        if decision.status == "proposed" and gain is not None and gain < 1.0:
            decision.status = "refused"
            decision.reason = "measured slower than what it replaces; keep='smaller' keeps it for its memory"


def _hold_budget(
    prepared: Prepared,
    profile: Profile,
    inputs: Mapping[str, list[list[Any]]],
    short: Mapping[str, list[list[Any]]],
    budget: Budget,
    bar: Progress,
) -> None:
    """Roll back places until the whole program holds the budget; single sites are probed on the short inputs."""
    decisions = profile.decisions
    proposed = [d for d in decisions if d.status == "proposed"]
    name = _widest_phase(prepared, {d.phase for d in proposed})
    if name is None:
        return
    worst = sorted((d for d in proposed if d.phase == name), key=lambda d: -(d.local_error or 0.0))[: budget.probes]
    with bar.stage("effect on the output", len(worst)):
        errors = output_errors(prepared.exported[name], name, worst, short[name][:1], prepared.shared, bar.step)
    for decision in worst:
        decision.output_error = errors.get(decision.site)

    if budget.evaluate is not None:
        evaluate = budget.evaluate
        baseline = float(evaluate(_build(prepared, _with(profile, []))))
        limit = baseline - (budget.max_drop or 0.0)
    else:
        evaluate = _output_error(prepared, inputs)
        baseline, limit = 0.0, -(budget.max_error or 0.0)

    def score(rolled_back: Sequence[str]) -> float:
        bar.step()
        return float(evaluate(_build(prepared, _with(profile, _without(decisions, rolled_back)))))

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


def _widest_phase(prepared: Prepared, phases: Collection[str]) -> str | None:
    """Of some phases the one that computes most at once: prefill of a language model, else the last."""
    names = [phase.name for phase in prepared.phases if phase.name in phases]
    return "prefill" if "prefill" in names else (names[-1] if names else None)


def _without(decisions: Sequence[Decision], places: Sequence[str]) -> list[Decision]:
    dropped = set(places)
    return [d for d in decisions if d.place not in dropped]


def _with(profile: Profile, decisions: list[Decision]) -> Profile:
    return profile.model_copy(update={"decisions": decisions})


def _build(prepared: Prepared, profile: Profile) -> Program:
    """Apply a profile's decisions to copies of the canonical phases; the program gets state of its own."""
    phases, before = [], {}
    state = {name: tensor.clone() for phase in prepared.phases for name, tensor in state_of(phase.exported).items()}
    status: dict[str, tuple[str, str]] = {}
    for phase in prepared.phases:
        exported = copy_exported(phase.exported)
        before[phase.name] = graph_text(exported)
        lossy = [decision for decision in profile.decisions if not is_exact(decision)]
        rewriting = apply_decisions(exported, phase.name, lossy, prepared.shared)
        rewriting.commit()
        status |= dict.fromkeys(rewriting.changes, ("kept", ""))
        status |= {site: ("failed", reason) for site, reason in rewriting.failed.items()}
        for name in state_of(exported):
            exported.state_dict[name] = state[name]
        phases.append(Phase(phase.plan, exported))
    decisions = [
        decision.model_copy(update=dict(zip(("status", "reason"), status[decision.site], strict=True)))
        if decision.status in ("proposed", "kept") and decision.site in status
        else decision
        for decision in profile.decisions
    ]
    captured = prepared.captured
    history = History(prepared.records, _refusals(prepared), before, dict(prepared.measured))
    final = profile.model_copy(update={"decisions": decisions})
    return Program(phases, captured.inputs, captured.kind, captured.facts, final, history)


def _refusals(prepared: Prepared) -> dict[str, dict[str, list[str]]]:
    return {
        phase: {
            family: [f"{r.module_path or r.node}: {r}" for r in refused] for family, refused in sites.refusals.items()
        }
        for phase, sites in prepared.sites.items()
    }


def _replay(prepared: Prepared, profile: Profile, found: Any) -> Program:
    profile.check(found)
    known = {site.id for sites in prepared.sites.values() for site in sites.all}
    for decision in profile.decisions:
        if decision.site not in known:
            raise InvalidArgument(f"the profile decides about {decision.site}, which this program does not have")
    prepared.shared.update(profile.tensors)
    return _build(with_exact(prepared, profile.decisions), profile)


def _refuse_conflicts(decisions: Sequence[Decision]) -> None:
    """Two methods may not rewrite one site: the second is refused with the pair named."""
    owner: dict[str, str] = {}
    for decision in decisions:
        if decision.status != "proposed":
            continue
        first = owner.setdefault(decision.site, decision.method)
        if first != decision.method:
            raise InvalidArgument(
                f"{first} and {decision.method} would both rewrite {decision.site}; choose one of them"
            )


def _check_arguments(methods: Any, profile: Any, budget: Any, target: str, mesh: Any, keep: str) -> None:
    if methods and profile is not None:
        raise InvalidArgument("give either methods, which decide, or a profile, which replays; not both")
    if isinstance(methods, str | Method) or not isinstance(methods, Sequence):
        raise InvalidType(f"methods must be a list of methods or their names, got {type(methods).__name__}")
    for method in methods:
        if not isinstance(method, str | Method):
            raise InvalidType(f"expected a method or its name, got {method!r}")
    if budget is not None and not isinstance(budget, Budget):
        raise InvalidType(f"budget must be a graphwright.Budget, got {type(budget).__name__}")
    if budget is not None and not methods:
        raise InvalidArgument("a budget needs methods to hold to it")
    if target not in TARGETS:
        raise InvalidArgument(f"unknown target {target!r}; there is {', '.join(TARGETS)}")
    if mesh is not None:
        raise InvalidArgument("mesh is not supported yet: programs run on one device")
    if keep not in ("faster", "smaller"):
        raise InvalidArgument(f"keep must be 'faster' or 'smaller', got {keep!r}")


def inspect(
    model: nn.Module | ExportedProgram | str | Path | Captured,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Inspection:
    """Find a model's sites without rewriting any.

    Args:
        model: As in `optimize`.
        args: As in `optimize`.
        kwargs: As in `optimize`.
        dynamic_shapes: As in `optimize`.

    Returns:
        An `Inspection`: print it for a table; `.sites` has the sites by phase, `.to_json()` plain data.
    """
    return Inspection(prepare(capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)).sites)


def search(
    model: nn.Module | ExportedProgram | str | Path | Captured,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    methods: Sequence[Method | str],
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    budget: Budget | None = None,
    keep: Keep = "faster",
    progress: bool = True,
) -> Profile:
    """Decide without keeping the program; the arguments are those of `optimize`.

    Returns:
        The profile, which `optimize(profile=...)` replays.

    Raises:
        GraphwrightError: As `optimize`.
    """
    program = optimize(
        model,
        args,
        kwargs,
        dynamic_shapes=dynamic_shapes,
        methods=methods,
        calibration=calibration,
        budget=budget,
        keep=keep,
        progress=progress,
    )
    return program.profile
