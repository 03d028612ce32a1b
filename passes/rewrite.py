"""Apply decisions to one phase: each site in its own transaction, so that one failure or rollback leaves the rest.

`shadow` mode computes the variants beside the originals without using them: one run then tells every site's own error
and time, on the inputs that the unchanged program gives it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import GraphwrightError
from ..patterns.find import find_sites
from .base import pass_named
from .change import Change
from .decision import Decision
from .dialects import verify
from .edit import Edit
from .manager import PassRecord
from .undo import Snapshot


@dataclass
class Stage:
    """A run of changes by one pass.

    Attributes:
        label: The pass.
        before: The graph before it.
        seconds: How long its rewrites took.
    """

    label: str
    before: Snapshot
    seconds: float = 0.0


@dataclass
class Rewriting:
    """Decisions applied to one phase, not yet final.

    Attributes:
        edit: The open edit.
        changes: Site id -> what was done there.
        failed: Site id -> why the site was left as it was.
        pairs: Site id -> (original node, its replacement), for every value that was replaced.
        stages: The passes in the order in which they ran, one that ran again a second time.
        verify_seconds: How long verifying took.
        taken_back: Whether a change was undone.
    """

    edit: Edit
    changes: dict[str, Change]
    failed: dict[str, str]
    pairs: dict[str, list[tuple[Node, Node]]]
    stages: list[Stage] = field(default_factory=list)
    verify_seconds: float = 0.0
    taken_back: bool = False

    def rollback(self, site: str) -> None:
        """Restore one site."""
        self.changes.pop(site).undo()
        self.taken_back = True

    def commit(self) -> int:
        """Drop what has become dead and verify the result.

        Returns:
            How many nodes were dropped.

        Raises:
            VerificationError: A rewrite broke an invariant.
        """
        started = time.perf_counter()
        dropped = self.edit.finish()
        names = sorted({change.label for change in self.changes.values()}) or ["no rewrite"]
        verify(self.edit.exported, "optimized", ", ".join(names), self.edit.touched)
        self.verify_seconds = time.perf_counter() - started
        return dropped

    def records(self, phase: str) -> list[PassRecord]:
        """What was done, after it was committed: a record a pass. None if nothing was.

        Passes that took turns, and sites that were taken back among others, have one record together.

        Args:
            phase: The phase's name.
        """
        if not self.changes:
            return []
        count = Counter(change.label for change in self.changes.values())
        stages = self.stages
        if self.taken_back or len(stages) != len(count):
            stages = [Stage(" + ".join(count), stages[0].before, sum(stage.seconds for stage in stages))]
            count = Counter({stages[0].label: count.total()})
        ends = [*(stage.before for stage in stages[1:]), Snapshot(self.edit.exported)]
        return [
            PassRecord(
                stage.label,
                phase,
                count[stage.label],
                stage.before.nodes,
                end.nodes,
                seconds=stage.seconds,
                verify_seconds=self.verify_seconds if stage is stages[-1] else 0.0,
                undo=stage.before.undo(end),
            )
            for stage, end in zip(stages, ends, strict=True)
        ]


def apply_decisions(
    exported: ExportedProgram,
    phase: str,
    decisions: Iterable[Decision],
    shared: dict[str, Tensor] | None = None,
    *,
    shadow: bool = False,
) -> Rewriting:
    """Rewrite the sites of one phase as decisions ask.

    Args:
        exported: The canonical program of the phase; edited in place.
        phase: Its name; decisions for other phases are skipped.
        decisions: What to do where.
        shared: Tensors that several phases share.
        shadow: Compute the variants, but let the program go on reading the originals.

    Returns:
        The open rewriting. A site that is gone, refused by its operator's contract, or whose rewrite raised, is
        unchanged and listed in `failed`.

    Raises:
        InvalidArgument: A decision names an unknown pass or option.
    """
    edit = Edit(exported, shared)
    edit.shadow = shadow
    rewriting = Rewriting(edit, {}, {}, {})
    wanted = _of_phase(decisions, phase)
    families = {decision.site.rsplit("/", 1)[-1].partition("[")[0] for decision in wanted}
    sites = {site.id: site for site in find_sites(edit.view, phase, families).all}
    for decision in wanted:
        step = pass_named(decision.pass_name, decision.options)
        site = sites.get(decision.site)
        if site is None:
            rewriting.failed[decision.site] = "there is no such site in this program"
            continue
        reason = step.guard(site, edit)
        if reason is not None:
            rewriting.failed[decision.site] = reason
            continue
        edit.provenance = {"pass": step.name, "method": decision.method, "site": decision.site}
        stages = rewriting.stages
        stage = stages[-1] if stages and stages[-1].label == step.name else Stage(step.name, _now(rewriting))
        started = time.perf_counter()
        try:
            with edit.transaction(step.name) as change:
                step.rewrite(site, edit)
        except Exception as error:
            name = "" if isinstance(error, GraphwrightError) else f"{type(error).__name__}: "
            rewriting.failed[decision.site] = (
                f"{step.name} raised {name}{str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        stage.seconds += time.perf_counter() - started
        if not stages or stage is not stages[-1]:
            stages.append(stage)
        rewriting.changes[decision.site] = change
        rewriting.pairs[decision.site] = [(old, new) for old, new, _ in change.redirected]
    edit.provenance = {}
    return rewriting


def _now(rewriting: Rewriting) -> Snapshot:
    """The graph as it would be if the rewriting ended here."""
    return Snapshot(rewriting.edit.exported, live=bool(rewriting.stages))


def agree_on_state(rewritings: Mapping[str, Rewriting], decisions: Iterable[Decision]) -> None:
    """Take back what changes state in one phase where another phase could not follow: phases share their state.

    Args:
        rewritings: Phase -> its open rewriting; what is taken back moves to its `failed`.
        decisions: What was to be done.
    """
    places: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.status not in ("proposed", "kept") or decision.phase not in rewritings:
            continue
        if pass_named(decision.pass_name, decision.options).changes_state:
            places.setdefault(decision.place, []).append(decision)
    for group in places.values():
        missing = sorted(set(rewritings) - {decision.phase for decision in group})
        failed = [f"{d.phase}: {reason}" for d in group if (reason := rewritings[d.phase].failed.get(d.site))]
        if not missing and not failed:
            continue
        reason = "; ".join(failed) or f"{', '.join(missing)} would keep the old state"
        for decision in group:
            rewriting = rewritings[decision.phase]
            if decision.site in rewriting.changes:
                rewriting.rollback(decision.site)
                rewriting.failed[decision.site] = f"another phase could not follow: {reason}"


def _of_phase(decisions: Iterable[Decision], phase: str) -> Sequence[Decision]:
    return [decision for decision in decisions if decision.phase == phase and decision.status in ("proposed", "kept")]
