"""A graph as rows of plain data, for reports and exports: what stands at each node, from where, with which inputs.

Weights have no row of their own: the calls that read them name them. State, the call's inputs and sizes have one.
"""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from .graph import GraphView
from .text import type_text

Row = dict[str, Any]
"""`op`: "input", "state", "call" or "output"; `target`: operator or name; `args`: text; `type`: `float32[1, s, 576]`;
`module`, `source`, `trace`: where it was traced; `inputs`: names of rows; `by`: pass, method and site that made it."""


def rows_of(exported: ExportedProgram) -> dict[str, Row]:
    """Name -> row, in graph order."""
    view = GraphView(exported)
    return {node.name: row_of(view, node) for node in exported.graph.nodes if has_row(view, node)}


def has_row(view: GraphView, node: Node) -> bool:
    """Whether a node is shown; a weight is not."""
    return not view.is_weight(node)


def row_of(view: GraphView, node: Node, args: Any = None, kwargs: Any = None, value: Any = None) -> Row:
    """One node as plain data.

    Args:
        view: The graph.
        node: The node.
        args: What to show instead of its arguments, of a node that has lost them.
        kwargs: The same for keyword arguments.
        value: The same for its value.
    """
    args = node.args if args is None else args
    kwargs = node.kwargs if kwargs is None else kwargs
    inputs: list[str] = []
    weights: list[str] = []

    def shown(argument: Node) -> Any:
        weight = view.target(argument) if view.is_weight(argument) else None
        into, name = (inputs, argument.name) if weight is None else (weights, weight)
        if name not in into:
            into.append(name)
        return _Name(f"%{name}" if weight is None else name)

    mapped: Any = map_arg((args, kwargs), shown)
    listed = [*map(str, mapped[0]), *(f"{name}={part}" for name, part in mapped[1].items())]
    op, target = _kind(view, node)
    row = {
        "op": op,
        "target": target,
        "args": ", ".join(listed) if op != "output" else "",
        "type": type_text(node, value),
        "module": view.module_path(node),
        "source": view.source(node),
        "trace": node.meta.get("stack_trace") or "",
        "inputs": inputs,
        "weights": weights,
    }
    if by := node.meta.get("graphwright"):
        row["by"] = dict(by)
    return row


def _kind(view: GraphView, node: Node) -> tuple[str, str]:
    if node.op == "placeholder":
        state = view.target(node)
        return ("input", node.name) if state is None else ("state", state)
    if node.op == "output":
        return "output", "output"
    return "call", str(node.target)


class _Name(str):
    """A name that shows without quotes inside lists and tuples."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
