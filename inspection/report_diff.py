"""Differences: of one phase before and after the lossy rewrites, and of two programs."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from ..errors import InvalidArgument
from ..passes.decision import Decision
from ..patterns.text import graph_text
from .graph_export import check_phase
from .printable import Printable
from .tables import Table

if TYPE_CHECKING:
    from ..program import Program

_MOST_DECISIONS = 40


def diff(program: Program, phase: str) -> str:
    """Unified diff of the phase's graph text before and after the lossy rewrites.

    Raises:
        InvalidArgument: There is no such phase.
    """
    check_phase(program, phase)
    before = program.history.before.get(phase, [])
    after = graph_text(program.phases[phase].exported)
    return "\n".join(
        difflib.unified_diff(before, after, f"{phase} (canonical)", f"{phase} (optimized)", lineterm="", n=1)
    )


class ProgramDiff(Printable):
    """Two programs beside each other: bytes, operators of each phase, decisions that differ, and the graphs.

    Args:
        first: A program.
        second: Another one, usually of the same model.
    """

    def __init__(self, first: Program, second: Program) -> None:
        self.first, self.second = first, second

    def operators(self, phase: str) -> list[tuple[str, int, int]]:
        """(operator, calls in the first, calls in the second) where they differ."""
        first, second = (_operators(program, phase) for program in (self.first, self.second))
        names = sorted({*first, *second})
        return [(name, first[name], second[name]) for name in names if first[name] != second[name]]

    def decisions(self) -> list[tuple[str, str, str]]:
        """(site, what the first decided, what the second decided) where they differ."""
        sides = [{d.site: d for d in program.decisions} for program in (self.first, self.second)]
        rows = []
        for site in dict.fromkeys([*sides[0], *sides[1]]):
            first, second = (_decided(side.get(site)) for side in sides)
            if first != second:
                rows.append((site, first, second))
        return rows

    def graph(self, phase: str) -> str:
        """Unified diff of a phase's graph text.

        Raises:
            InvalidArgument: One of the programs has no such phase.
        """
        texts = []
        for name, program in (("first", self.first), ("second", self.second)):
            if phase not in program.phases:
                raise InvalidArgument(f"the {name} program has no phase {phase!r}; it has {', '.join(program.phases)}")
            texts.append(graph_text(program.phases[phase].exported))
        before, after = texts
        names = f"{phase} (first)", f"{phase} (second)"
        return "\n".join(difflib.unified_diff(before, after, *names, lineterm="", n=1))

    def to_json(self) -> dict[str, Any]:
        """The differences as plain data."""
        return {
            "phases": [list(self.first.phases), list(self.second.phases)],
            "weight_bytes": [self.first.weight_bytes(), self.second.weight_bytes()],
            "state_bytes": [self.first.state_bytes(), self.second.state_bytes()],
            "operators": {phase: self.operators(phase) for phase in self._phases()},
            "decisions": self.decisions(),
        }

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._summary()]
        for phase in self._phases():
            rows = self.operators(phase)
            if not rows:
                parts.append(f"{phase}: the same operators")
                continue
            table = Table("operator", title=f"{phase}: calls")
            for column in ("first", "second"):
                table.add_column(column, justify="right")
            for name, *counts in rows:
                table.add_row(name, *map(str, counts))
            parts.append(table)
        decisions = self.decisions()
        if decisions:
            table = Table("site", "first", "second", title=f"{len(decisions)} decisions differ")
            for row in decisions[:_MOST_DECISIONS]:
                table.add_row(*row)
            parts.append(table)
            if len(decisions) > _MOST_DECISIONS:
                parts.append(f"  {len(decisions) - _MOST_DECISIONS} more: --json has all")
        else:
            parts.append("The decisions are the same.")
        return Group(*parts)

    def _phases(self) -> list[str]:
        return list(dict.fromkeys([*self.first.phases, *self.second.phases]))

    def _summary(self) -> Table:
        table = Table("", "first", "second", title="two programs")
        sides = (self.first, self.second)
        for name, values in (
            ("kind", [p.kind for p in sides]),
            ("phases", [", ".join(p.phases) for p in sides]),
            ("weights", [f"{p.weight_bytes() / 1e6:.1f} MB" for p in sides]),
            ("state", [f"{p.state_bytes() / 1e6:.1f} MB" for p in sides]),
            ("methods", [", ".join(m["name"] for m in p.profile.methods) or "none" for p in sides]),
            ("kept", [str(sum(d.status == "kept" for d in p.decisions)) for p in sides]),
        ):
            table.add_row(name, *values)
        return table


def _operators(program: Program, phase: str) -> Counter[str]:
    if phase not in program.phases:
        return Counter()
    nodes = program.phases[phase].exported.graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")


def _decided(decision: Decision | None) -> str:
    if decision is None:
        return "-"
    plain = {name: value for name, value in decision.options.items() if not isinstance(value, list | tuple)}
    options = ", ".join(f"{name}={value}" for name, value in plain.items())
    status = decision.status.replace("_", " ")
    return f"{status}: {decision.pass_name or 'no pass'}" + (f" ({options})" if options else "")
