"""One site from beginning to end: match, guards, decision, passes, measured figures, and the line of the model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from ..errors import InvalidArgument
from ..passes.base import pass_named
from ..passes.copy_exported import copy_exported
from ..passes.decision import Decision
from ..passes.edit import Edit
from ..patterns.find import find_sites
from ..patterns.graph import GraphView
from ..patterns.nodes import shape_of
from ..patterns.site import Site
from ..patterns.text import graph_line

if TYPE_CHECKING:
    from ..program import Program

_FIGURES = (
    ("predicted_gain", "{:.2%} of the phase's arithmetic"),
    ("measured_gain", "{:.2f}x at the site"),
    ("local_error", "{:.3%} at the site's output"),
    ("output_error", "{:.3%} at the program's output, this site alone"),
)


def explain(program: Program, site_id: str) -> str:
    """The whole chain for one site.

    Args:
        program: The program.
        site_id: A site id; or a module path, which is answered with what nearly was a site there.

    Raises:
        InvalidArgument: There is no such site; the message has the nearest ids.
    """
    decisions = [d for d in program.decisions if d.site == site_id]
    present = {s.id: s for sites in program.sites.values() for s in sites.all}
    site = present.get(site_id)
    if not decisions and site is None:
        near = list(_refusals(program, site_id))
        if near:
            return "\n".join([f"no site at {site_id}; nearly:", *near])
        known = sorted({*present, *(d.site for d in program.decisions)})
        close = difflib.get_close_matches(site_id, known, 3, 0.3)
        raise InvalidArgument(f"no site {site_id!r}; near it: {', '.join(close) or 'none'}")
    lines = [site_id, *_match(program, site_id, site, decisions)]
    for decision in decisions:
        lines += _decision(decision)
        lines += _guard(program, site, decision)
    if not decisions:
        lines.append("  no method decided about it")
    lines += _passes(program, site_id)
    lines += [f"  now in the graph: {graph_line(view, node)}" for view, node in _nodes_of(program, site_id, site)]
    return "\n".join(lines)


def _match(program: Program, site_id: str, site: Site | None, decisions: list[Decision]) -> Iterator[str]:
    if site is not None:
        yield from (f"  {name}: {value}" for name, value in site.describe().items())
    elif decisions:
        yield "  matched before it was rewritten:"
        yield from (f"  {name}: {value}" for name, value in decisions[0].facts.items())
    sources = [site.source] if site is not None else [v.source(n) for v, n in _nodes_of(program, site_id, None)]
    source = next(filter(None, sources), "")
    if source:
        yield f"  source: {source}"


def _decision(decision: Decision) -> Iterator[str]:
    options = ", ".join(f"{name}={_short(value)}" for name, value in decision.options.items())
    yield f"  {decision.method} decided {decision.pass_name}" + (f" with {options}" if options else "")
    yield f"    status: {decision.status.replace('_', ' ')}" + (f", {decision.reason}" if decision.reason else "")
    for name, form in _FIGURES:
        value = getattr(decision, name)
        if value is not None:
            yield f"    {name.replace('_', ' ')}: {form.format(value)}"
    yield from (f"    {name}: {_short(value)}" for name, value in decision.figures.items())


def _guard(program: Program, site: Site | None, decision: Decision) -> Iterator[str]:
    """What the pass's guard, which asks the operator's contract, says of the site as it is now."""
    if not decision.pass_name:
        return
    if site is None:
        yield f"    guard of {decision.pass_name}: held when the site was rewritten"
        return
    step = pass_named(decision.pass_name, decision.options)
    exported = copy_exported(program.phases[decision.phase].exported)
    node = next((n for n in exported.graph.nodes if n.name == site.node.name), None)
    if node is not None:
        edit = Edit(exported)
        again = {s.id: s for s in find_sites(edit.view, decision.phase, (site.kind,)).all}.get(site.id)
        if again is not None:
            yield f"    guard of {decision.pass_name}: {step.guard(again, edit) or 'holds'}"


def _passes(program: Program, site_id: str) -> Iterator[str]:
    """What the passes did in the site's module."""
    phase, _, rest = site_id.partition("/")
    module = rest.rpartition("/")[0]
    view = GraphView(program.phases[phase].exported)
    known = {node.name: view.module_path(node) for node in view.graph.nodes}
    for record in program.history.passes:
        if record.undo is not None and record.phase in ("captured", phase):
            known.update({name: row["module"] for _, name, row in record.undo["removed"]})
    for record in program.history.passes:
        if record.undo is None or record.phase not in ("captured", phase):
            continue
        removed = {name for _, name, row in record.undo["removed"] if row["module"] == module}
        changed = {name for name in record.undo["changed"] if known.get(name) == module}
        added = {name for name in record.undo["added"] if known.get(name) == module}
        done = [(sorted(added), "added"), (sorted(removed), "removed"), (sorted(changed), "changed")]
        said = "; ".join(f"{what} {', '.join(names)}" for names, what in done if names)
        if said:
            yield f"  pass {record.name} ({'all phases' if record.phase == 'captured' else record.phase}): {said}"


def _nodes_of(program: Program, site_id: str, site: Site | None) -> list[tuple[GraphView, Node]]:
    found = []
    for phase in program.phases.values():
        view = GraphView(phase.exported)
        for node in phase.exported.graph.nodes:
            by = node.meta.get("graphwright", {})
            made = site_id in (by.get("site"), *by.get("sites", ()))
            if (made or node is (site and site.node)) and shape_of(node):
                found.append((view, node))
    return found


def _refusals(program: Program, text: str) -> Iterator[str]:
    for phase, sites in program.sites.items():
        for family, refusals in sites.refusals.items():
            for refusal in sorted(refusals, key=lambda refusal: -refusal.depth):
                if text in (refusal.module_path, f"{phase}/{refusal.module_path}", refusal.node):
                    where = f" at {refusal.source}" if refusal.source else ""
                    yield f"  {phase}: no {family}: {refusal}{where}"


def _short(value: Any) -> str:
    """A value for one line: long lists by their length and range."""
    if isinstance(value, list | tuple) and len(value) > 8:
        numbers = all(isinstance(item, int | float) for item in value)
        return f"{len(value)} values" + (f" from {min(value)} to {max(value)}" if numbers else "")
    return repr(value)
