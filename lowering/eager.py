"""Lower a program to a module that PyTorch runs as it is: weights as attributes, state written in place.

    new = index_copy(cache, 2, at, k)        becomes        cache.index_copy_(2, at, k)
    output_specs: new -> cache                              (nothing is copied back)

A functional write to a state buffer copies the whole buffer twice, once to compute it and once to store it. Where
nobody reads the old contents afterwards the write is done in place; else the result is copied into the buffer at the
end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

IN_PLACE: dict[Any, Any] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.add.Tensor: aten.add_.Tensor,
    aten.copy.default: aten.copy_.default,
}


def lower_eager(exported: ExportedProgram) -> Callable[..., tuple[Any, ...]]:
    """Make a callable of a functional program.

    Args:
        exported: The program; it is not changed, and its tensors are used, not copied.

    Returns:
        A `GraphModule` that takes the user inputs, flat, and returns the user outputs, flat. State is written into the
        very tensors of `exported.state_dict`, so phases that share them see each other's writes.
    """
    signature = exported.graph_signature
    root = nn.Module()
    graph = Graph()
    mapping: dict[Node, Node] = {}
    inputs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    state: dict[str, Node] = {}
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
        state[spec.target] = mapping[node]

    writes = {
        spec.arg.name: spec.target
        for spec in signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION and spec.target is not None
    }
    order = {node: position for position, node in enumerate(exported.graph.nodes)}
    stored_back: dict[str, Node] = {}
    for node in exported.graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        copy = graph.node_copy(node, mapping.__getitem__)
        target = writes.get(node.name)
        if target is not None and _may_be_in_place(node, inputs, target, order):
            copy.target = IN_PLACE[node.target]
        elif target is not None:
            stored_back[target] = copy
        if node.op == "get_attr":
            setattr(root, str(node.target), getattr(exported.graph_module, str(node.target)))
        mapping[node] = copy
    returned = exported.graph.output_node().args[0]
    assert isinstance(returned, list | tuple)
    for value, spec in zip(returned, signature.output_specs, strict=True):
        # A state buffer that becomes a value computed elsewhere, such as an input, is stored too.
        if spec.kind is OutputKind.BUFFER_MUTATION and isinstance(value, Node) and value.op == "placeholder":
            stored_back[str(spec.target)] = mapping[value]
    for target, value in stored_back.items():
        graph.call_function(aten.copy_.default, (state[target], value))
    users = []
    for value, spec in zip(returned, signature.output_specs, strict=True):
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue
        result = mapping[value] if isinstance(value, Node) else value
        if isinstance(value, Node) and value.name in writes:
            # The caller must not see the next call's write in a value that it was given.
            result = graph.call_function(aten.clone.default, (result,))
        users.append(result)
    graph.output(tuple(users))
    graph.lint()
    return GraphModule(root, graph, class_name="Eager")


def _may_be_in_place(node: Node, inputs: dict[str, Any], target: str, order: dict[Node, int]) -> bool:
    """Whether a write may overwrite its base: the base is the buffer itself, and nobody reads it later."""
    base = node.args[0] if node.args else None
    if node.target not in IN_PLACE or not isinstance(base, Node) or base.op != "placeholder":
        return False
    if inputs[base.name].target != target or _shape(base) != _shape(node):
        return False
    return all(order[user] <= order[node] for user in _readers(base))


def _readers(base: Node) -> set[Node]:
    """Everything that reads a buffer's storage: its users, and the users of views of it."""
    readers: set[Node] = set()
    stack = list(base.users)
    while stack:
        user = stack.pop()
        if user in readers:
            continue
        readers.add(user)
        schema = getattr(user.target, "_schema", None)
        aliases = schema is not None and any(ret.alias_info is not None for ret in schema.returns)
        if aliases or user.target is aten.reshape.default:
            stack.extend(user.users)
    return readers


def _shape(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
