"""Lower a program to a module that PyTorch runs as it is: weights as attributes, state written in place.

    new = index_copy(cache, 2, at, k)        becomes        cache.index_copy_(2, at, k)
    output_specs: new -> cache                              (nothing is copied back)

A functional write to a state buffer copies the whole buffer twice, once to compute it and once to store it. Where
nobody reads the old contents afterwards the write is done in place; else the result is copied into the buffer at the
end. Several writes may follow each other, and one may write several buffers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from ..kernels import cache_append as _cache_append  # noqa: F401 (registers the operators)
from ..kernels import page_append as _page_append  # noqa: F401
from ..kernels import page_recall as _page_recall  # noqa: F401
from ..kernels import window_cache_append as _window_cache_append  # noqa: F401

aten = torch.ops.aten

IN_PLACE: dict[Any, Any] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.add.Tensor: aten.add_.Tensor,
    aten.copy.default: aten.copy_.default,
    torch.ops.graphwright.cache_append.default: torch.ops.graphwright.cache_append_.default,
    torch.ops.graphwright.page_append.default: torch.ops.graphwright.page_append_.default,
    torch.ops.graphwright.page_recall.default: torch.ops.graphwright.page_recall_.default,
    torch.ops.graphwright.window_cache_append.default: torch.ops.graphwright.window_cache_append_.default,
}

OVERWRITTEN: dict[Any, tuple[int, ...]] = {
    torch.ops.graphwright.page_append.default: (0, 1, 2, 3, 4),
    torch.ops.graphwright.page_recall.default: (0, 1, 2, 3),
}
"""Arguments that an operator with several results overwrites in place, result by result; else it is the first one."""


def lower_eager(exported: ExportedProgram) -> Callable[..., tuple[Any, ...]]:
    """Make a callable of a functional program.

    Args:
        exported: The program; it is not changed, and its tensors are used, not copied.

    Returns:
        A `GraphModule` that takes the user inputs, flat, and returns the user outputs, flat. State is written into the
        very tensors of `exported.state_dict`, so phases that share them see each other's writes; inputs that the model
        writes are written too. What is returned never shares memory with what is written.
    """
    signature = exported.graph_signature
    root = nn.Module()
    graph = Graph()
    mapping: dict[Node, Node] = {}
    inputs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    for node in exported.graph.find_nodes(op="placeholder", sort=True):
        spec = inputs[node.name]
        if spec.kind is InputKind.USER_INPUT or spec.target is None:
            mapping[node] = graph.placeholder(node.name)
            continue
        stored = exported.state_dict.get(spec.target)
        stored = exported.constants[spec.target] if stored is None else stored
        assert isinstance(stored, Tensor)
        name = node.name
        root.register_buffer(name, stored.detach() if isinstance(stored, nn.Parameter) else stored, persistent=False)
        mapping[node] = graph.get_attr(name)

    returned = exported.graph.output_node().args[0]
    assert isinstance(returned, list | tuple)
    # An input that the model writes is named by its placeholder, state by its qualified name.
    bases = {inputs[node.name].target or node.name: node for node in mapping}
    writes = {
        bases[spec.target]: value
        for value, spec in zip(returned, signature.output_specs, strict=True)
        if spec.kind is not OutputKind.USER_OUTPUT and spec.target is not None and isinstance(value, Node)
    }
    order = {node: position for position, node in enumerate(exported.graph.nodes)}
    in_place, lies_in = _writes_in_place(exported.graph, writes, order)
    for node in exported.graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
        if node in in_place:
            mapping[node].target = IN_PLACE[node.target]
        if node.op == "get_attr":
            setattr(root, str(node.target), getattr(exported.graph_module, str(node.target)))

    def kept(value: Node, unstable: set[Node]) -> Node:
        """The value, copied where it may be a view of something that is written after it."""
        return graph.call_function(aten.clone.default, (mapping[value],)) if value in unstable else mapping[value]

    written = {alias for node in (*writes, *writes.values()) for alias in _aliases(node)}
    users = [
        kept(value, written) if isinstance(value, Node) else value
        for value, spec in zip(returned, signature.output_specs, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    copied = {base: value for base, value in writes.items() if value is base or lies_in.get(value) is not base}
    overwritten = {alias for base in copied for alias in _aliases(base)}
    stored_back = {base: kept(value, overwritten) for base, value in copied.items()}
    for base, value in stored_back.items():
        graph.call_function(aten.copy_.default, (mapping[base], value))
    graph.output(tuple(users))
    graph.lint()
    return GraphModule(root, graph, class_name="Eager")


def _writes_in_place(
    graph: Graph, writes: dict[Node, Node], order: dict[Node, int]
) -> tuple[set[Node], dict[Node, Node]]:
    """The calls that may overwrite what they are given, and the state buffer whose memory each result then lies in."""
    calls: set[Node] = set()
    lies_in = {base: base for base in writes}
    for node in graph.nodes:
        places = OVERWRITTEN.get(node.target)
        if node.target not in IN_PLACE or (places is None and writes.get(node.args[0]) is not node):
            continue
        old = [node.args[place] for place in places or (0,)]
        new = [node] if places is None else _results(node, len(old))
        if all(
            isinstance(value, Node) and value in lies_in and _may_overwrite(node, value, result, order)
            for value, result in zip(old, new, strict=True)
        ):
            calls.add(node)
            lies_in |= {result: lies_in[value] for value, result in zip(old, new, strict=True) if result is not None}  # pyright: ignore[reportArgumentType] (checked above)
    return calls, lies_in


def _results(node: Node, count: int) -> list[Node | None]:
    """The results of a call that has several, None where nobody takes one."""
    taken = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    return [taken.get(number) for number in range(count)]


def _may_overwrite(node: Node, value: Node, result: Node | None, order: dict[Node, int]) -> bool:
    """Whether a call may overwrite a value: nobody reads it later, nor the call itself by another argument."""
    if result is not None and _shape(value) != _shape(result):
        return False
    aliases = _aliases(value)
    arguments = (*node.args, *node.kwargs.values())
    if sum(isinstance(argument, Node) and argument in aliases for argument in arguments) != 1:
        return False
    return all(order[user] <= order[node] for alias in aliases for user in alias.users)


def _aliases(base: Node) -> set[Node]:
    """A node and everything that may be a view of it."""
    found = {base}
    stack = [base]
    while stack:
        views = [user for user in stack.pop().users if user not in found and _is_view(user)]
        found.update(views)
        stack += views
    return found


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    declared = schema is not None and any(value.alias_info is not None for value in schema.returns)
    return declared or node.target in (operator.getitem, aten._unsafe_view.default)


def _shape(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
