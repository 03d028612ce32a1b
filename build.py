"""From decisions to a program: copies of the canonical phases, rewritten, over one set of weights and one of state."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.export import ExportedProgram

from .errors import InvalidArgument
from .passes.base import Pass, pass_named
from .passes.copy_exported import copy_exported
from .passes.decision import Decision
from .passes.hoist_order import HoistOrder
from .passes.manager import PassManager
from .passes.rewrite import Rewriting, agree_on_state, apply_decisions
from .passes.stack_linears import StackLinears, common_stacks
from .patterns.text import graph_text
from .phases import Phase, state_of
from .prepare import Prepared, is_exact
from .profiles.profile import Profile
from .program import History, Program


def finishers(phases: Sequence[ExportedProgram]) -> tuple[Pass, ...]:
    """Exact passes over rewritten graphs, in order."""
    return HoistOrder(), StackLinears(common_stacks(phases))


def build(prepared: Prepared, profile: Profile, *, final: bool = False, only: Collection[str] | None = None) -> Program:
    """Apply a profile's decisions to copies of the canonical phases.

    Args:
        prepared: The canonical phases; not changed.
        profile: Decisions with status "proposed" or "kept" are applied.
        final: Also run the exact passes that make a rewritten graph quicker; programs of a search do without.
        only: Names of the phases to build, all by default; calls of the others are refused then.

    Returns:
        A program with state of its own. Its decisions say what became of them: a rewrite that raised is "failed".
    """
    phases, before, records = [], {}, list(prepared.records)
    state = {name: tensor.clone() for phase in prepared.phases for name, tensor in state_of(phase.exported).items()}
    status: dict[str, tuple[str, str]] = {}
    rewritings: dict[str, Rewriting] = {}
    lossy = [decision for decision in profile.decisions if not is_exact(decision)]
    wanted = [phase for phase in prepared.phases if only is None or phase.name in only]
    for phase in wanted:
        exported = copy_exported(phase.exported)
        before[phase.name] = graph_text(exported)
        rewritings[phase.name] = apply_decisions(exported, phase.name, lossy, prepared.shared)
    agree_on_state(rewritings, lossy)
    by_step = any(_is_by_step(decision) for decision in lossy if decision.status in ("proposed", "kept"))
    for phase in wanted:
        rewriting = rewritings[phase.name]
        rewriting.commit()
        if final:
            records += rewriting.records(phase.name)
        status |= dict.fromkeys(rewriting.changes, ("kept", ""))
        status |= {site: ("failed", reason) for site, reason in rewriting.failed.items()}
        if by_step and rewriting.failed:
            site, reason = next(iter(rewriting.failed.items()))
            raise InvalidArgument(f"{site} cannot be rewritten, and what is kept between steps needs all: {reason}")
    last = finishers([rewriting.edit.exported for rewriting in rewritings.values()]) if final else ()
    for phase in wanted:
        exported = rewritings[phase.name].edit.exported
        if final:
            records += PassManager(last).run(exported, phase.name, prepared.shared)
        for name, tensor in state_of(exported).items():
            exported.state_dict[name] = state.setdefault(name, tensor)
        plan = phase.plan
        if by_step:
            first = phase is prepared.phases[0]
            plan = plan.model_copy(update={"falls": prepared.captured.facts["timestep"], "begins": first})
        phases.append(Phase(plan, exported))
    for phase in phases:
        # A phase may read what only others write.
        phase.exported.state_dict.update({n: t for n, t in state.items() if n in phase.exported.state_dict})
    decisions = [
        decision.model_copy(update=dict(zip(("status", "reason"), status[decision.site], strict=True)))
        if decision.status in ("proposed", "kept") and decision.site in status
        else decision
        for decision in profile.decisions
    ]
    captured = prepared.captured
    measured = prepared.measured | {"bytes_before": _bytes(prepared)}
    history = History(records, _refusals(prepared), before, measured)
    settled = profile.model_copy(update={"decisions": decisions})
    return Program(phases, captured.inputs, captured.kind, captured.facts, settled, history)


def _bytes(prepared: Prepared) -> dict[str, int]:
    """Bytes of the captured weights and state, each storage once."""
    exported = prepared.captured.exported
    state = set(state_of(exported))
    found: dict[str, dict[int, int]] = {"weights": {}, "state": {}}
    for name, tensor in {**exported.constants, **exported.state_dict}.items():
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            found["state" if name in state else "weights"][storage.data_ptr()] = storage.nbytes()
    return {kind: sum(sizes.values()) for kind, sizes in found.items()}


def _is_by_step(decision: Decision) -> bool:
    return bool(decision.pass_name) and pass_named(decision.pass_name, decision.options).by_step


def _refusals(prepared: Prepared) -> dict[str, dict[str, list[str]]]:
    return {
        phase: {
            family: [f"{r.module_path or r.node}: {r}" for r in refused] for family, refused in sites.refusals.items()
        }
        for phase, sites in prepared.sites.items()
    }
