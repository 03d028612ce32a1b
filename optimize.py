"""The one call: capture, canonicalize, match, decide, rewrite.

The data's way reads from top to bottom in `optimize`; each step is a function of this file or of the folder that
answers its question.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.export import ExportedProgram

from .build import build
from .calibrate_denoiser import Recorded, compare_outputs, denoiser_inputs
from .capture import Captured, capture
from .errors import InvalidArgument, InvalidType
from .hold_budget import hold_budget
from .inspection.report import Inspection
from .passes.base import pass_named
from .passes.decision import Decision
from .patterns.steps import DEFAULT_TIMESTEPS, StepRange, step_ranges
from .prepare import Prepared, prepare, with_exact
from .profiles.attention_figures import attention_figures
from .profiles.budget import Budget
from .profiles.calibration import calibration_inputs
from .profiles.compose import compose
from .profiles.measure import measure_sites
from .profiles.method import Context, Method, method_named
from .profiles.profile import Profile, data_hash, fingerprint, hardware, versions
from .profiles.reuse_figures import channel_groups, reuse_figures, reuses
from .profiles.rotation_figures import rotation_figures
from .program import Program
from .progress import Progress
from .step_trials import StepTrials

TARGETS = ("eager",)
PROBE_TOKENS = 64
"""Tokens of a text on which single sites are probed: enough to rank them, and short."""
MOST_ITEMS = 8
"""Calibration items that are used; of a denoiser's, so many a phase."""
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
        calibration: `(args, kwargs)` items; for language models also token tensors; for denoisers also samplers, each
            a callable that samples one prompt with the denoiser it is given and returns the video. The example inputs
            by default.
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
        if profile is not None and not isinstance(profile, Profile):
            profile = Profile.load(profile)
        most = None if captured.kind == "denoiser" else MOST_ITEMS
        items = None if calibration is None else list(islice(calibration, most))
        if profile is None:
            chosen = [method.search_steps(StepTrials(captured, items or [], bar)) for method in chosen]
        with bar.stage("canonicalize"):
            prepared = prepare(captured, _steps(captured, chosen) if profile is None else profile.steps)
        found = fingerprint(prepared.exported)
        if profile is not None:
            with bar.stage("replay"):
                return _replay(prepared, profile, found)
        recorded = Recorded()
        if captured.kind == "denoiser" and items is not None:
            recorded = denoiser_inputs(
                build(prepared, Profile(fingerprint=found, data="")), items, prepared.steps, bar, MOST_ITEMS
            )
            inputs = recorded.inputs
        else:
            inputs = calibration_inputs(prepared.exported, captured.kind, captured.facts, items)

        def trial(tried: Sequence[Decision], only: Collection[str] | None = None) -> Program:
            return build(prepared, Profile(fingerprint=found, data="", decisions=list(tried)), only=only)

        context = Context(
            prepared.exported, prepared.sites, inputs, captured.facts, prepared.steps, bar, trial, keep=keep
        )
        started = time.perf_counter()
        decisions = compose([decision for method in chosen for decision in method.decide(context)])
        prepared.measured["decide_seconds"] = time.perf_counter() - started
        if budget is not None:
            _refuse_budget(decisions)
        prepared.shared.update(context.tensors)
        prepared = with_exact(prepared, decisions)
        result = Profile(
            fingerprint=found,
            methods=[{"name": method.name, "options": method.model_dump(mode="json")} for method in chosen],
            decisions=decisions,
            steps=list(prepared.steps.values()),
            versions=versions(),
            hardware=hardware(),
            data=data_hash(flat for items in inputs.values() for flat in items),
            measured=context.measured,
        )
        result.tensors.update(context.tensors)
        if chosen:
            with bar.stage("measure"):
                _measure(prepared, decisions, inputs, chosen if keep == "faster" else None)
            if budget is not None:
                short = inputs
                if captured.kind == "causal_lm":
                    short = calibration_inputs(
                        prepared.exported, captured.kind, captured.facts, items, longest=PROBE_TOKENS
                    )
                hold_budget(prepared, result, inputs, short, budget, bar)
        with bar.stage("rewrite"):
            program = build(prepared, result, final=True)
        _measure_attention(program, inputs, bar)
        _measure_rotations(program, inputs)
        compare_outputs(program, recorded, bar)
        return program


def _measure_attention(program: Program, inputs: Mapping[str, list[list[Any]]], bar: Progress) -> None:
    """Note what attentions keep or reuse, on the first calibration input of each phase."""
    with bar.stage("recall of sparse attention", len(program.phases)):
        for name, phase in program.phases.items():
            found = attention_figures(phase.exported, inputs[name][0]) if inputs.get(name) else {}
            if inputs.get(name) and reuses(phase.exported):
                reused, _ = reuse_figures(phase.exported, inputs[name][0], channel_groups(program.decisions))
                found = {site: found.get(site, {}) | reused.get(site, {}) for site in {*found, *reused}}
            for decision in program.decisions:
                figures = found.get(decision.site)
                if figures is None or decision.status != "kept":
                    continue
                rows = figures.pop("row", None)
                if rows is not None:
                    names = pass_named(decision.pass_name, decision.options).row_names()
                    figures |= {"type": [names[row] for row in rows]} if names else {}
                decision.figures |= figures
            bar.step()


def _measure_rotations(program: Program, inputs: Mapping[str, list[list[Any]]]) -> None:
    """Note the channels of rotated streams before and after, in one phase: prefill, which computes most at once."""
    for decision in program.decisions:
        rotation = program.profile.tensors.get(str(decision.options.get("rotation")))
        first = "prefill" if "prefill" in program.phases else next(iter(program.phases))
        wanted = decision.pass_name == "rotate" and decision.status == "kept" and decision.phase == first
        if wanted and rotation is not None and inputs.get(first):
            exported = program.phases[first].exported
            found = rotation_figures(exported, inputs[first][0], rotation)
            decision.figures = decision.figures | found  # the phases of a place may share one record of figures


def _steps(captured: Captured, methods: Sequence[Method]) -> list[StepRange]:
    """The ranges of denoising steps that get a phase each, so that every method finds its own edges."""
    if captured.kind != "denoiser":
        return []
    timesteps = captured.facts.get("timesteps") or DEFAULT_TIMESTEPS
    schedules = [schedule for method in methods if (schedule := method.schedule(len(timesteps))) is not None]
    return step_ranges(timesteps, schedules)


def _measure(
    prepared: Prepared,
    decisions: list[Decision],
    inputs: Mapping[str, list[list[Any]]],
    faster: Sequence[Method] | None,
) -> None:
    """Error and time of every proposal at its own site.

    Args:
        prepared: The canonical phases.
        decisions: They are changed.
        inputs: By phase.
        faster: The methods, where what is slower is to be refused, once they have said what to try in its stead.
    """
    started = time.perf_counter()
    least: dict[Any, float] = {}
    _measure_once(prepared, decisions, inputs, least)
    if faster is not None:
        methods = {method.name: method for method in faster}
        changed = []
        for decision in filter(_is_slower, decisions):
            other = methods[decision.method].instead(decision) if decision.method in methods else None
            if other is not None:
                decision.pass_name, decision.options, decision.facts = other.pass_name, other.options, other.facts
                changed.append(decision)
        _measure_once(prepared, changed, inputs, least)
        for decision in filter(_is_slower, decisions):
            decision.status = "refused"
            decision.reason = "measured slower than what it replaces; keep='smaller' keeps it for its memory"
    prepared.measured["measure_seconds"] = time.perf_counter() - started


def _measure_once(
    prepared: Prepared,
    decisions: Sequence[Decision],
    inputs: Mapping[str, list[list[Any]]],
    least: dict[Any, float],
) -> None:
    for phase in prepared.phases:
        proposals = [d for d in decisions if d.phase == phase.name and d.status == "proposed" and not _is_by_step(d)]
        flat = inputs.get(phase.name, [])
        if not proposals or not flat:
            continue
        measured, failed = measure_sites(phase.exported, phase.name, proposals, flat[:1], prepared.shared, least)
        for decision in proposals:
            measure = measured.get(decision.site)
            if _changes_state(decision):
                # Its time depends on how much state there is, which a calibration input does not show.
                decision.local_error = None if measure is None else measure.error
                if decision.site in failed:
                    decision.status, decision.reason = "failed", failed[decision.site]
                continue
            if measure is None:
                decision.status, decision.reason = "failed", failed.get(decision.site, "could not be measured")
                continue
            decision.local_error, decision.measured_gain = measure.error, measure.gain


def _is_slower(decision: Decision) -> bool:
    return decision.status == "proposed" and decision.measured_gain is not None and decision.measured_gain < 1.0


def _changes_state(decision: Decision) -> bool:
    return pass_named(decision.pass_name, decision.options).changes_state


def _is_by_step(decision: Decision) -> bool:
    return pass_named(decision.pass_name, decision.options).by_step


def _refuse_budget(decisions: Sequence[Decision]) -> None:
    found = next((d for d in decisions if d.status == "proposed" and _is_by_step(d)), None)
    if found is not None:
        raise InvalidArgument(
            f"{found.method} keeps what its sites share from step to step, so a Budget cannot roll back one of them;"
            f" set the budget of {found.method} itself"
        )


def _replay(prepared: Prepared, profile: Profile, found: Any) -> Program:
    profile.check(found)
    known = {site.id for sites in prepared.sites.values() for site in sites.all}
    for decision in profile.decisions:
        if decision.site not in known:
            raise InvalidArgument(f"the profile decides about {decision.site}, which this program does not have")
    prepared.shared.update(profile.tensors)
    return build(with_exact(prepared, profile.decisions), profile, final=True)


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
