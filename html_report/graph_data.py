"""The graphs of one phase as plain data: every node that was in it after any pass, and what each pass changed.

All nodes are drawn at fixed layers whatever pass is looked at, so that a slider over passes moves nothing about. The
last graph is stored whole, earlier ones as what leads back to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ..passes.manager import PassRecord
from ..passes.undo import step_back
from ..patterns.rows import Row, rows_of
from .module_groups import group_nodes

if TYPE_CHECKING:
    from ..program import Program

MISSING = (
    "The graphs between the passes were not kept: this program was saved by an earlier version of graphwright. "
    "Run optimize again, or replay its profile, and save it anew to see them."
)


class Strings:
    """Texts by number: names, types and source lines come up again and again."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._number: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a text."""
        if text not in self._number:
            self._number[text] = len(self.texts)
            self.texts.append(text)
        return self._number[text]


def phase_data(program: Program, phase: str, strings: Strings) -> dict[str, Any]:
    """One phase as plain data.

    Args:
        program: The program.
        phase: Name of the phase.
        strings: Where texts are kept; numbers stand for them.

    Returns:
        `nodes`: columns of the nodes that ever were there; `groups`: the module tree; `steps`: one for the graph as
        captured and one a pass, each with the way back; `canonical`: the step before decisions were applied;
        `missing`: why there are no steps, or "".
    """
    last = rows_of(program.phases[phase].exported)
    records, missing = _records(program, phase)
    states = [last]
    for record in reversed(records):
        assert record.undo is not None
        states.insert(0, step_back(states[0], record.undo))
    names = _merged([list(state) for state in states])
    union: dict[str, Row] = {name: row for state in states for name, row in state.items()}
    number = {name: position for position, name in enumerate(names)}
    edges = {
        (number[source], number[name])
        for state in states
        for name, row in state.items()
        for source in row["inputs"]
        if source in number
    }
    tree = group_nodes(names, _homes(names, union, edges), sorted(edges))
    return {
        "when": " and ".join(map(str, program.phases[phase].plan.conditions)) or "otherwise",
        "nodes": _columns(names, union, number, tree.parents, tree.layers, strings),
        "groups": [[strings.number(g.label), strings.number(g.path), g.parent, g.layer] for g in tree.groups],
        "last": [number[name] for name in last],
        "steps": [_first_step(states[0], records, missing), *(_step(r, number, strings) for r in records)],
        "canonical": _canonical(program, records),
        "missing": missing,
    }


def _records(program: Program, phase: str) -> tuple[list[PassRecord], str]:
    """The passes that changed the graph of a phase, back to the first whose change was kept."""
    known: list[PassRecord] = []
    records = [r for r in program.history.passes if r.phase in ("captured", phase) and r.changed]
    for record in reversed(records):
        if record.undo is None:
            return known[::-1], MISSING
        known.append(record)
    return known[::-1], ""


def _merged(orders: Sequence[list[str]]) -> list[str]:
    """All names in one order: each new one behind what it stands behind where it first appears."""
    merged = orders[0]
    for order in orders[1:]:
        known = set(merged)
        behind: dict[str, list[str]] = {}
        previous = ""
        for name in order:
            if name in known:
                previous = name
            else:
                behind.setdefault(previous, []).append(name)
        merged = [*behind.get("", []), *(each for name in merged for each in (name, *behind.get(name, [])))]
    return merged


def _homes(names: list[str], rows: dict[str, Row], edges: set[tuple[int, int]]) -> list[str]:
    """The module in which each node is drawn: its own; that of all its readers for state, which no module made."""
    homes = [rows[name]["module"] for name in names]
    shared: dict[int, list[str]] = {}
    for source, target in edges:
        if rows[names[source]]["op"] == "state" and homes[target]:
            path = homes[target].split(".")
            known = shared.setdefault(source, path)
            shared[source] = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(known, path, strict=False))]
    for node, path in shared.items():
        homes[node] = ".".join(path)
    return homes


def _columns(
    names: list[str], rows: dict[str, Row], number: dict[str, int], parents: list[int], layers: list[int], s: Strings
) -> dict[str, Any]:
    traces = {(row["module"], row["source"]): row["trace"] for row in rows.values() if row.get("trace")}
    columns: dict[str, Any] = {name: [] for name in ("op", "target", "args", "type", "module", "source", "trace", "by")}
    for name in names:
        row = rows[name]
        for field in ("op", "target", "args", "type", "module", "source"):
            columns[field].append(s.number(row[field]))
        # The trace of a node that went is that of what stands for it now: it came from the same line.
        columns["trace"].append(s.number(row.get("trace") or traces.get((row["module"], row["source"]), "")))
        by = row.get("by")
        columns["by"].append([*(s.number(by.get(key, "")) for key in ("pass", "method")), _sites(by, s)] if by else 0)
    columns["name"] = [s.number(name) for name in names]
    columns["inputs"] = [_numbers(rows[name]["inputs"], number) for name in names]
    columns["weights"] = [[s.number(weight) for weight in rows[name].get("weights", ())] for name in names]
    columns["parent"], columns["layer"] = parents, layers
    return columns


def _sites(by: dict[str, Any], s: Strings) -> list[int]:
    """The sites that a call stands for: one, or those of all linears that it joins."""
    return [s.number(site) for site in (*by.get("sites", ()), by.get("site")) if site]


def _numbers(names: Sequence[str], number: dict[str, int]) -> list[int]:
    return [number[name] for name in names if name in number]


def _first_step(rows: dict[str, Row], records: list[PassRecord], missing: str) -> dict[str, Any]:
    name = "captured" if not missing else "earliest that was kept" if records else "final"
    return {"name": name, "calls": sum(row["op"] == "call" for row in rows.values())}


def _step(record: PassRecord, number: dict[str, int], strings: Strings) -> dict[str, Any]:
    undo = record.undo
    assert undo is not None
    return {
        "name": record.name,
        "phase": record.phase,
        "changed": record.changed,
        "nodes": [record.nodes_before, record.nodes_after],
        "seconds": round(record.seconds, 4),
        "verify": round(record.verify_seconds, 4),
        "difference": record.difference,
        "added": _numbers(undo["added"], number),
        "removed": _numbers([name for _, name, _ in undo["removed"]], number),
        "before": {
            str(number[name]): {field: _packed(field, value, number, strings) for field, value in fields.items()}
            for name, fields in undo["changed"].items()
            if name in number
        },
    }


def _packed(field: str, value: Any, number: dict[str, int], strings: Strings) -> Any:
    if field == "inputs":
        return _numbers(value, number)
    return [strings.number(v) for v in value] if field == "weights" else strings.number(value)


def _canonical(program: Program, records: list[PassRecord]) -> int:
    """The step before the first pass that a decision asked for; the last step where none did."""
    asked = {decision.pass_name for decision in program.decisions if decision.pass_name}
    for position, record in enumerate(records):
        if asked & set(record.name.split(" + ")):
            return position
    return len(records)
