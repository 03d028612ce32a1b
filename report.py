"""What happened, for people and for scripts: tables of sites and decisions, explanations, graph text, diffs.

Everything here reads a `Program` or its sites; nothing changes them.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import networkx as nx
from rich.console import Console, Group, RenderableType
from torch.fx import Node

from .errors import InvalidArgument
from .passes.decision import Decision
from .patterns.find import Sites
from .patterns.graph import GraphView, shape_of
from .patterns.text import graph_line, graph_text, type_text
from .report_attention import attention_parts
from .report_cache import cache_parts
from .tables import Table

if TYPE_CHECKING:
    from .program import Program

_WIDTH = 118


class _Printable:
    """Prints as a rich table on a terminal and as plain text elsewhere."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(width=_WIDTH, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get().rstrip()

    __repr__ = __str__


class Inspection(_Printable):
    """The sites of a program before anything is rewritten.

    Attributes:
        sites: Phase -> sites.
    """

    def __init__(self, sites: Mapping[str, Sites]) -> None:
        self.sites = dict(sites)

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
            parts.append(_site_table(phase, sites))
            for family, refusals in sites.refusals.items():
                nearest = sites.nearest_miss(family)
                if nearest is not None:
                    where = nearest.module_path or nearest.node
                    parts.append(f"  {len(refusals)} near {family}: nearest miss at {where}: {nearest}")
        return Group(*parts)


class Report(_Printable):
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
        table = Table(title="passes", title_justify="left")
        for column in ("phase", "pass", "rewrites", "nodes", "time", "check", "largest difference"):
            table.add_column(column, justify="left" if column in ("phase", "pass") else "right")
        for record in self.program.history.passes:
            if record.changed:
                table.add_row(
                    record.phase,
                    record.name,
                    str(record.changed),
                    f"{record.nodes_before} -> {record.nodes_after}",
                    f"{record.seconds:.2f} s",
                    f"{record.verify_seconds:.2f} s",
                    "-" if record.difference is None else f"{record.difference:.1e}",
                )
        return table


def explain(program: Program, site_id: str) -> str:
    """The whole chain for one site: facts, decision, figures, what stands in the graph now, source line."""
    decisions = [d for d in program.decisions if d.site == site_id]
    present = {s.id: s for sites in program.sites.values() for s in sites.all}
    if not decisions and site_id not in present:
        known = sorted({*present, *(d.site for d in program.decisions)})
        near = difflib.get_close_matches(site_id, known, 3, 0.3)
        raise InvalidArgument(f"no site {site_id!r}; near it: {', '.join(near) or 'none'}")
    lines = [site_id]
    if site_id in present:
        site = present[site_id]
        lines += [f"  {name}: {value}" for name, value in site.describe().items()]
        lines += [f"  source: {site.source}"] if site.source else []
    for decision in decisions:
        options = ", ".join(f"{name}={_short(value)}" for name, value in decision.options.items())
        lines.append(f"  {decision.method} decided {decision.pass_name}" + (f" with {options}" if options else ""))
        if site_id not in present:
            lines += [f"    {name}: {value}" for name, value in decision.facts.items()]
        lines.append(f"    status: {decision.status}" + (f", {decision.reason}" if decision.reason else ""))
        for name, form in (
            ("predicted_gain", "{:.2%} of the phase's arithmetic"),
            ("measured_gain", "{:.2f}x at the site"),
            ("local_error", "{:.3%} at the site's output"),
            ("output_error", "{:.3%} at the program's output, this site alone"),
        ):
            value = getattr(decision, name)
            if value is not None:
                lines.append(f"    {name.replace('_', ' ')}: {form.format(value)}")
        lines += [f"    {name}: {_short(value)}" for name, value in decision.figures.items()]
    nodes = _nodes_of(program, site_id)
    lines += [f"  now in the graph: {graph_line(view, node)}" for view, node in nodes]
    if not decisions:
        lines.append("  no method decided about it")
    return "\n".join(lines)


def diff(program: Program, phase: str) -> str:
    """Unified diff of the phase's graph text before and after the lossy rewrites."""
    _check_phase(program, phase)
    before = program.history.before.get(phase, [])
    after = graph_text(program.phases[phase].exported)
    return "\n".join(
        difflib.unified_diff(before, after, f"{phase} (canonical)", f"{phase} (optimized)", lineterm="", n=1)
    )


def to_networkx(program: Program, phase: str) -> nx.DiGraph:
    """The phase's graph; node attributes are plain strings, so GraphML export works."""
    _check_phase(program, phase)
    exported = program.phases[phase].exported
    view = GraphView(exported)
    graph = nx.DiGraph(phase=phase)
    for node in exported.graph.nodes:
        provenance = node.meta.get("graphwright", {})
        graph.add_node(
            node.name,
            op=node.op,
            target=view.target(node) or str(node.target),
            type=type_text(node),
            module=view.module_path(node),
            source=view.source(node),
            **{f"made_by_{key}": str(value) for key, value in provenance.items()},
        )
        for argument in node.all_input_nodes:
            graph.add_edge(argument.name, node.name)
    return graph


def dump_json(value: _Printable) -> str:
    """A report or inspection as JSON text."""
    return json.dumps(value.to_json(), indent=1, default=str)  # pyright: ignore[reportAttributeAccessIssue]


def _site_table(phase: str, sites: Sites) -> Table:
    table = Table(
        title=f"{phase}: {', '.join(f'{n} {k}' for k, n in _counts(sites).items() if n)}", title_justify="left"
    )
    table.add_column("site", overflow="fold")
    table.add_column("facts", overflow="fold")
    table.add_column("source", overflow="ellipsis", no_wrap=True, max_width=36)
    for site in sites.all:
        facts = ", ".join(f"{name} {value}" for name, value in site.describe().items())
        table.add_row(site.id.split("/", 1)[1], facts, site.source)
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


def _nodes_of(program: Program, site_id: str) -> list[tuple[GraphView, Node]]:
    found = []
    for phase in program.phases.values():
        view = GraphView(phase.exported)
        found += [
            (view, node)
            for node in phase.exported.graph.nodes
            if node.meta.get("graphwright", {}).get("site") == site_id and shape_of(node)
        ]
    return found


def _short(value: Any) -> str:
    """A value for one line: long lists by their length and range."""
    if isinstance(value, list | tuple) and len(value) > 8:
        numbers = all(isinstance(item, int | float) for item in value)
        return f"{len(value)} values" + (f" from {min(value)} to {max(value)}" if numbers else "")
    return repr(value)


def _check_phase(program: Program, phase: str) -> None:
    if phase not in program.phases:
        raise InvalidArgument(f"no phase {phase!r}; there are {', '.join(program.phases)}")
