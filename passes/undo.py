"""What a pass changed in a graph, kept so that the graph before it can be shown.

A program holds its last graph. Each pass record holds the way one step back, as plain data, so that a page can show the
graph after any pass and a file stays small: rows of the nodes that went, names of those that came, fields that differ.
"""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.fx import Graph, Node

from ..patterns.graph import GraphView
from ..patterns.rows import Row, has_row, row_of

Undo = dict[str, Any]
"""`added`: names; `removed`: [name of the row before it, or "", its name, its row], in graph order; `changed`: name ->
the fields of the row that were different."""

_COMPARED = ("op", "target", "args", "type", "module", "source", "inputs", "weights")


class Snapshot:
    """A graph as it is now, for comparing it with what a pass makes of it.

    Nodes, arguments and values are referred to, not copied: a pass puts new ones in their place and leaves these.

    Args:
        exported: The program; what changes it later leaves the snapshot as it is.
        live: Leave out what no output needs: an edit that is still open has the nodes that it replaced, too.

    Attributes:
        nodes: How many nodes it has, weights included.
    """

    def __init__(self, exported: ExportedProgram, *, live: bool = False) -> None:
        nodes = _needed(exported.graph) if live else list(exported.graph.nodes)
        self.nodes = len(nodes)
        self._view = GraphView(exported)
        self._seen: dict[str, tuple[Node, Any, Any, Any]] = {
            node.name: (node, node.args, node.kwargs, node.meta.get("val"))
            for node in nodes
            if has_row(self._view, node)
        }

    def undo(self, later: ExportedProgram | Snapshot) -> Undo:
        """The way from a program, as it is or was after a pass, back to this snapshot."""
        after = later if isinstance(later, Snapshot) else Snapshot(later)
        changed: dict[str, Row] = {}
        removed: list[list[Any]] = []
        previous = ""
        for name, seen in self._seen.items():
            there = after._seen.get(name)
            if there is None:
                removed.append([previous, name, self._row(*seen)])
            elif any(now is not then for now, then in zip(there, seen, strict=True)):
                old, new = self._row(*seen), after._row(*there)
                if fields := {field: old[field] for field in _COMPARED if old[field] != new[field]}:
                    changed[name] = fields
            previous = name
        return {
            "added": [name for name in after._seen if name not in self._seen],
            "removed": removed,
            "changed": changed,
        }

    def _row(self, node: Node, args: Any, kwargs: Any, value: Any) -> Row:
        row = row_of(self._view, node, args, kwargs, value)
        del row["trace"]  # long, and mostly that of what stands in the node's place now
        return row


def _needed(graph: Graph) -> list[Node]:
    """The inputs, and what outputs are made of, in graph order."""
    found = {node for node in graph.nodes if node.op == "output" or (node.op == "placeholder" and not node.users)}
    open_ends = list(found)
    while open_ends:
        for node in open_ends.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                open_ends.append(node)
    return [node for node in graph.nodes if node in found]


def step_back(rows: dict[str, Row], undo: Undo) -> dict[str, Row]:
    """The rows before a pass, from those after it."""
    gone = set(undo["added"])
    changed = undo["changed"]
    order = {name: row | changed[name] if name in changed else row for name, row in rows.items() if name not in gone}
    behind = {previous: (name, row) for previous, name, row in undo["removed"]}  # one row has one row before it
    result: dict[str, Row] = {}
    for name, row in [("", {}), *order.items()]:
        if name:
            result[name] = row
        while name in behind:
            name, row = behind.pop(name)
            result[name] = row
    # What stood behind a row that is nowhere, because a pass put it elsewhere, stands at the end.
    return result | dict(behind.values())


_FIELDS = {"op": str, "target": str, "args": str, "type": str, "module": str, "source": str, "inputs": list}


def check_undo(undo: Any) -> Undo | None:
    """What a file holds of a pass, or None where it was written before that was kept.

    Raises:
        ValueError: It is not what `Snapshot.undo` makes.
    """
    if undo is None:
        return None
    fine = (
        isinstance(undo, dict)
        and set(undo) == {"added", "removed", "changed"}
        and _texts(undo["added"])
        and all(len(item) == 3 and _texts(item[:2]) and _row_is_fine(item[2]) for item in undo["removed"])
        and all(isinstance(fields, dict) and set(fields) <= {*_COMPARED} for fields in undo["changed"].values())
    )
    if not fine:
        raise ValueError("a pass record has no way back to the graph before it, but something else in its place")
    return undo


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _row_is_fine(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in _FIELDS.items())
