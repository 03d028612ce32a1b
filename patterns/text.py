"""A graph as text: one readable line a call, with shapes, weight names and module paths."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from .graph import GraphView
from .nodes import is_size


def graph_text(exported: ExportedProgram) -> list[str]:
    """The graph as readable lines, one a call, in graph order; the last names what is returned."""
    view = GraphView(exported)
    return [graph_line(view, node) for node in exported.graph.nodes if node.op in ("call_function", "output")]


def graph_line(view: GraphView, node: Node) -> str:
    """One call: `%name: float32[1, s, 576] = aten.linear.default(%x, weight)  # module path`."""

    def shown(argument: Node) -> Any:
        return _Bare(view.target(argument) or f"%{argument.name}")

    mapped: Any = map_arg((node.args, node.kwargs), shown)
    args, kwargs = mapped
    if node.op == "output":
        return f"return {', '.join(map(str, args[0]))}"
    listed = [*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())]
    where = view.module_path(node)
    return f"%{node.name}: {type_text(node)} = {node.target}({', '.join(listed)})" + (f"  # {where}" if where else "")


def type_text(node: Node, value: Any = None) -> str:
    """`float32[1, s, 576]`; "size" for arithmetic on sizes. `value` is shown instead of what the node has now."""
    value = node.meta.get("val") if value is None else value
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join('tensor' if isinstance(item, Tensor) else str(item) for item in value)})"
    return "size" if is_size(node) else "-"


class _Bare(str):
    """A string that shows without quotes inside lists and tuples."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
