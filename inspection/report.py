"""What happened, for people and for scripts: tables of sites, decisions and passes.

Everything here reads a `Program` or its sites; nothing changes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from ..passes.decision import Decision
from ..patterns.find import Sites
from .printable import Printable
from .report_attention import attention_parts
from .report_cache import cache_parts
from .report_sites import site_tree
from .report_sparsity import sparsity_parts
from .tables import Table

if TYPE_CHECKING:
    from ..program import Program


class Inspection(Printable):
    """The sites of a program before anything is rewritten.

    Attributes:
        sites: Phase -> sites.
        every: Print each of several layers that are alike; false by default.
    """

    def __init__(self, sites: Mapping[str, Sites]) -> None:
        self.sites = dict(sites)
        self.every = False

    def to_json(self) -> dict[str, Any]:
        """Sites and refusals as plain data."""
        return {
            phase: {
                "sites": [
                    {"id": s.id, "kind": s.kind, "module": s.module_path, "source": s.source, **s.describe()}
                    for s in sites.all
                ],
                "refusals": {
                    family: [
                        {"node": r.node, "module": r.module_path, "source": r.source, "reason": str(r)} for r in items
                    ]
                    for family, items in sites.refusals.items()
                },
            }
            for phase, sites in self.sites.items()
        }

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        for phase, sites in self.sites.items():
            parts.append(site_tree(phase, sites, every=self.every))
            for family, refusals in sites.refusals.items():
                nearest = sites.nearest_miss(family)
                if nearest is not None:
                    where = nearest.module_path or nearest.node
                    parts.append(f"  {len(refusals)} near {family}: nearest miss at {where}: {nearest}")
        return Group(*parts)


class Report(Printable):
    """What was found, tried, kept, refused and rolled back, and why."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        program, history = self.program, self.program.history
        measured = {**program.profile.measured, **history.measured}
        return {
            "kind": program.kind,
            "phases": {
                name: {
                    "when": [str(condition) for condition in phase.plan.conditions],
                    "nodes": sum(node.op == "call_function" for node in phase.exported.graph.nodes),
                    "sites": _counts(program.sites[name]),
                }
                for name, phase in program.phases.items()
            },
            "weight_bytes": program.weight_bytes(),
            "state_bytes": program.state_bytes(),
            "offload": program.offload_figures(),
            "passes": [
                {
                    "name": r.name,
                    "phase": r.phase,
                    "changed": r.changed,
                    "nodes": [r.nodes_before, r.nodes_after],
                    "seconds": round(r.seconds, 4),
                    "verify_seconds": round(r.verify_seconds, 4),
                    "difference": r.difference,
                }
                for r in history.passes
            ],
            "refusals": history.refusals,
            "methods": program.profile.methods,
            "measured": {name: value for name, value in measured.items() if name != "video_frames"},
            "decisions": [decision.model_dump(mode="json") for decision in program.decisions],
        }

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._phases()]
        if self.program.decisions:
            parts += [self._decisions(), *self._left_out(), *attention_parts(self.program)]
            parts += cache_parts(self.program)
            parts += sparsity_parts(self.program)
            frontier = self.program.profile.measured.get("frontier")
            if frontier:
                parts.append(self._frontier(frontier))
        else:
            parts.append("No method was asked for: this is the canonical program, exact.")
        if any(record.changed for record in self.program.history.passes):
            parts.append(self._passes())
        return Group(*parts)

    def _phases(self) -> Table:
        program = self.program
        size = f"{program.weight_bytes() / 1e6:.1f} MB of weights, {program.state_bytes() / 1e6:.1f} MB of state"
        table = Table(title=f"{program.kind}: {size}", title_justify="left", expand=False)
        for column in ("phase", "when", "calls", "attention", "linear", "cache", "norm", "residual"):
            table.add_column(column)
        for name, phase in program.phases.items():
            calls = sum(node.op == "call_function" for node in phase.exported.graph.nodes)
            sites = program.sites[name]
            families = (sites.attention, sites.linear, sites.cache, sites.norm, sites.residual)
            when = " and ".join(map(str, phase.plan.conditions)) or "otherwise"
            table.add_row(name, when, str(calls), *(str(len(family)) for family in families))
        return table

    def _decisions(self) -> Table:
        table = Table(title="decisions, by phase and role", title_justify="left")
        for column, justify in (
            ("phase", "left"),
            ("pass", "left"),
            ("role", "left"),
            ("kept", "right"),
            ("not kept", "right"),
            ("speed-up at the site", "right"),
            ("error at the site", "right"),
        ):
            table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
        groups: dict[tuple[str, str, str], list[Decision]] = {}
        for decision in self.program.decisions:
            role = decision.facts.get("role") or decision.facts.get("attention") or "-"
            key = (decision.phase, decision.pass_name or "-", role)
            groups.setdefault(key, []).append(decision)
        for (phase, pass_name, role), group in groups.items():
            kept = [decision for decision in group if decision.status == "kept"]
            table.add_row(
                phase,
                pass_name,
                role,
                str(len(kept)),
                str(len(group) - len(kept)),
                _span([d.measured_gain for d in kept], "{:.1f}x"),
                _span([d.local_error for d in kept], "{:.2%}"),
            )
        return table

    def _left_out(self) -> Iterable[str]:
        reasons = Counter(
            (decision.status, decision.reason) for decision in self.program.decisions if decision.status != "kept"
        )
        for (status, reason), count in reasons.most_common(12):
            yield f"  {count} {status.replace('_', ' ')}: {reason}"
        rolled_back = sorted({d.place for d in self.program.decisions if d.status == "rolled_back"})
        for place in rolled_back[:12]:
            yield f"    rolled back: {place}"

    def _frontier(self, frontier: list[dict[str, Any]]) -> Table:
        budget = self.program.profile.measured["budget"]
        error = budget["metric"] != "evaluate"
        title = f"budget: canonical {budget['baseline']:.6g}, must stay above {budget['limit']:.6g}"
        if error:
            title = f"budget: relative L2 error of the output at most {-budget['limit']:.4g}"
        table = Table(title=title, title_justify="left")
        for column in ("rolled back", "kept", "error" if error else "score", "share of linear arithmetic", "holds"):
            table.add_column(column, justify="right")
        for point in frontier:
            table.add_row(
                str(point["rolled_back"]),
                str(point["kept"]),
                f"{abs(point['score']) if error else point['score']:.6g}",
                f"{point['gain']:.1%}",
                "yes" if point["holds"] else "no",
            )
        return table

    def _passes(self) -> Table:
        table = Table(title="passes, times in seconds", title_justify="left")
        for column in ("phase", "pass", "rewrites", "nodes", "time", "check", "largest difference"):
            whole = column in ("nodes", "time", "check")
            table.add_column(column, justify="left" if column in ("phase", "pass") else "right", no_wrap=whole)
        for record in self.program.history.passes:
            if record.changed:
                table.add_row(
                    record.phase,
                    record.name,
                    str(record.changed),
                    f"{record.nodes_before} -> {record.nodes_after}",
                    f"{record.seconds:.2f}",
                    f"{record.verify_seconds:.2f}",
                    "-" if record.difference is None else f"{record.difference:.1e}",
                )
        return table


def _counts(sites: Sites) -> dict[str, int]:
    return {
        "attention": len(sites.attention),
        "linear": len(sites.linear),
        "cache": len(sites.cache),
        "norm": len(sites.norm),
        "residual": len(sites.residual),
    }


def _span(values: Iterable[float | None], form: str) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    low, high = form.format(known[0]), form.format(known[-1])
    return low if low == high else f"{low} to {high}"
