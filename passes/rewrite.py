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
class Rewriting:
    """Decisions applied to one phase, not yet final.

    Attributes:
        edit: The open edit.
        changes: Site id -> what was done there.
        failed: Site id -> why the site was left as it was.
        pairs: Site id -> (original node, its replacement), for every value that was replaced.
        before: The graph before, for the record.
        seconds: How long rewriting took, and verifying.
    """

    edit: Edit
    changes: dict[str, Change]
    failed: dict[str, str]
    pairs: dict[str, list[tuple[Node, Node]]]
    before: Snapshot
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def rollback(self, site: str) -> None:
        """Restore one site."""
        self.changes.pop(site).undo()

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
        self.seconds[1] = time.perf_counter() - started
        return dropped

    def records(self, phase: str) -> list[PassRecord]:
        """What was done, after it was committed, as one record: the sites are rewritten in one go. None if nothing was.

        Args:
            phase: The phase's name.
        """
        if not self.changes:
            return []
        count = Counter(change.label for change in self.changes.values())
        graph, undo = self.edit.exported.graph, self.before.undo(self.edit.exported)
        nodes, name = (self.before.nodes, len(graph.nodes)), " + ".join(count)
        seconds, check = self.seconds
        return [PassRecord(name, phase, count.total(), *nodes, seconds=seconds, verify_seconds=check, undo=undo)]


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
    started = time.perf_counter()
    edit = Edit(exported, shared)
    edit.shadow = shadow
    rewriting = Rewriting(edit, {}, {}, {}, Snapshot(exported))
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
        try:
            with edit.transaction(step.name) as change:
                step.rewrite(site, edit)
        except Exception as error:
            name = "" if isinstance(error, GraphwrightError) else f"{type(error).__name__}: "
            rewriting.failed[decision.site] = (
                f"{step.name} raised {name}{str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        rewriting.changes[decision.site] = change
        rewriting.pairs[decision.site] = [(old, new) for old, new, _ in change.redirected]
    edit.provenance = {}
    rewriting.seconds[0] = time.perf_counter() - started
    return rewriting


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
