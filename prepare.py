"""Canonical phases with their sites: what methods look at, and what their decisions are applied to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from .capture import Captured
from .errors import InvalidArgument, VerificationError
from .passes.assume_empty_cache import AssumeEmptyCache
from .passes.base import pass_named
from .passes.canonicalize import canonicalize
from .passes.copy_exported import copy_exported
from .passes.decision import Decision
from .passes.dialects import TOLERANCE, largest_difference, run_functional
from .passes.fix_sizes import FixSizes
from .passes.manager import PassManager, PassRecord
from .passes.merge_duplicates import MergeDuplicates
from .passes.rewrite import apply_decisions
from .patterns.find import FAMILIES, Sites, find_sites
from .patterns.graph import GraphView
from .patterns.steps import StepRange
from .phases import Phase, PhasePlan, plan_steps
from .torch_private import pytree


@dataclass
class Prepared:
    """Canonical phases with their sites, before anything lossy.

    Attributes:
        captured: Where they came from.
        phases: In the order in which their conditions are tried.
        sites: Phase -> sites.
        records: What the exact passes did.
        steps: Phase -> the denoising steps that it runs; empty where phases are something else.
        shared: Tensors that rewrites make once for all phases.
        measured: Figures for the report.
    """

    captured: Captured
    phases: list[Phase]
    sites: dict[str, Sites]
    records: list[PassRecord]
    steps: dict[str, StepRange] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def exported(self) -> dict[str, ExportedProgram]:
        """Phase -> canonical program."""
        return {phase.name: phase.exported for phase in self.phases}


def prepare(captured: Captured, steps: Sequence[StepRange] = ()) -> Prepared:
    """Canonicalize a captured program and specialise it into its phases.

    Args:
        captured: What capture returned; it is not changed.
        steps: For a denoiser the ranges of steps that get a phase each; one phase for all steps where there are none.

    Returns:
        The phases, which share all tensors.

    Raises:
        VerificationError: A pass broke an invariant.
    """
    started = time.perf_counter()
    base = copy_exported(captured.exported)
    shared: dict[str, Tensor] = {}
    records = canonicalize(base, "captured", shared)
    plans = plan_steps(captured.facts["timestep"], steps) if steps else captured.plans
    phases = [Phase(plan, _specialise(base, plan, shared, records)) for plan in plans]
    families = _families(captured)
    sites = {phase.name: find_sites(GraphView(phase.exported), phase.name, families) for phase in phases}
    prepared = Prepared(captured, phases, sites, records, {step.name: step for step in steps}, shared)
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
    phases, records = [], list(prepared.records)
    for phase in prepared.phases:
        exported = copy_exported(phase.exported)
        rewriting = apply_decisions(exported, phase.name, exact, prepared.shared)
        for site, reason in rewriting.failed.items():
            raise InvalidArgument(f"{site} cannot be rewritten as decided: {reason}")
        rewriting.commit()
        records += rewriting.records(phase.name)
        phases.append(Phase(phase.plan, exported))
    for decision in exact:
        decision.status = "kept"
    families = _families(prepared.captured)
    sites = {phase.name: find_sites(GraphView(phase.exported), phase.name, families) for phase in phases}
    return replace(prepared, phases=phases, sites=sites, records=records)


def _families(captured: Captured) -> tuple[str, ...]:
    """What is looked for: in a denoiser blocks too, whose tokens change little from step to step."""
    return (*FAMILIES, "block") if captured.kind == "denoiser" else FAMILIES


def is_exact(decision: Decision) -> bool:
    """Whether a decision's pass leaves the numbers as they are."""
    return bool(decision.pass_name) and bool(pass_named(decision.pass_name, decision.options).exact)


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
