"""Single nodes of an exported graph: what they call, with which arguments, of which sizes and dtypes.

Kinds of operators that matchers tell apart (views, casts, arithmetic on sizes), and sizes that may be symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

RESHAPES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
)
"""Operators that keep the elements and their order, and change the sizes only."""

VIEWS = RESHAPES | frozenset(
    {
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.expand.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.slice.Tensor,
        aten.select.int,
    }
)
"""Operators whose every output element is one input element: layout only, so that they can be proved on indices."""

PARTS = frozenset(
    {operator.getitem, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
)
"""Operators that cut a tensor into several, and the choice of one of them."""

CASTS = frozenset(
    {
        aten.to.dtype,
        aten._to_copy.default,
        aten.to.dtype_layout,
        aten.to.device,
        torch.ops.prims.convert_element_type.default,
    }
)

SIZE_OPERATORS = frozenset({aten.sym_size.int, aten.sym_numel.default})


class NotEvaluable(Exception):
    """A subgraph depends on a value that was not given; carries the node."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"depends on {node.name}")
        self.node = node


def first_tensor(node: Node) -> Node:
    """The node's principal input: the first one that is a tensor and not a weight scalar.

    Raises:
        NotEvaluable: There is none.
    """
    for argument in node.args:
        if isinstance(argument, Node) and isinstance(argument.meta.get("val"), Tensor):
            return argument
        if isinstance(argument, list | tuple):
            for item in argument:
                if isinstance(item, Node):
                    return item
    raise NotEvaluable(node)


def concrete(value: Any, sizes: Mapping[Any, int]) -> Any:
    """A size, boolean or float with the symbols replaced by their values; plain numbers pass through.

    Raises:
        KeyError: A symbol of the value has no assignment.
    """
    if not isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return value
    expression = value.node.expr.subs({symbol: sizes[symbol] for symbol in value.node.expr.free_symbols})
    if isinstance(value, torch.SymBool):
        return bool(expression)
    return float(expression) if isinstance(value, torch.SymFloat) else int(expression)


def free_symbols(value: Any) -> set[Any]:
    """The size symbols in a tensor's shape, or in a size."""
    if isinstance(value, Tensor):
        return {symbol for size in value.shape for symbol in free_symbols(size)}
    if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return set(value.node.expr.free_symbols)
    if isinstance(value, list | tuple):
        return {symbol for item in value for symbol in free_symbols(item)}
    return set()


def shape_of(node: Node) -> tuple[Any, ...]:
    """The node's sizes, symbolic ones as `SymInt`; () for a node without tensor metadata."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def dtype_of(node: Node) -> torch.dtype | None:
    """The node's dtype, or None for a node without tensor metadata."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are provably equal. Never adds a guard, so the program stays as dynamic as it was."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return statically_known_true(left == right)


def same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are provably equal."""
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))


def arguments(node: Node) -> dict[str, Any]:
    """A call's arguments by the operator's schema names, defaults filled in, whatever way it was called."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(position): value for position, value in enumerate(node.args)} | dict(node.kwargs)
    result = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            result[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            result[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            result[argument.name] = argument.default_value
    return result


def strip(node: Node, through: frozenset[Any]) -> Node:
    """Walk back from a node over operators of the set, along their principal input."""
    while node.op == "call_function" and node.target in through:
        node = first_tensor(node)
    return node


def is_call(node: object, *targets: Any) -> bool:
    """Whether a node calls one of the operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_size(node: Node) -> bool:
    """Whether a node is arithmetic on sizes, not on tensors."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat | int | bool)


def describe(node: Node) -> str:
    """`name: dtype[sizes]` for reports."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return node.name
    sizes = ", ".join(str(size) for size in value.shape)
    return f"{node.name}: {str(value.dtype).removeprefix('torch.')}[{sizes}]"
