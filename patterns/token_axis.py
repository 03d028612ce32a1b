"""Which dimension of a tensor counts tokens, and what each operator does along it: a table of rules, one an operator.

    reads(node, dim)      output token i is made of token i of these operands, whatever the other tokens are
    unordered(node)       operands whose tokens are summed up, so that they may be in any order: keys and values, sums
    values_read(...)      how often an operand's values count, and not only its sizes and dtype

A rule proves what it says from shapes and arguments; an operator without a rule is taken to depend on positions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..torch_private import pytree
from .attention_forms import SDPA
from .nodes import CASTS, RESHAPES, arguments, aten, is_size, same_size


class Read(NamedTuple):
    """An operand, and the dimension along which it is read token by token."""

    operand: Node
    dim: int


def reads(node: Node, dim: int) -> tuple[Read, ...] | None:
    """The operands of which an output's tokens are made, one by one.

    Args:
        node: A call. Where it gives several tensors (split), `dim` is that of each.
        dim: The output's dimension that counts tokens, not negative.

    Returns:
        Token i of the output depends on token i of these operands and on no other; an operand that is not named has
        no tokens, or is read as a whole. () where all tokens are alike. None where the operator mixes tokens, depends
        on their positions, or has no rule.
    """
    if node.op != "call_function":
        return None
    rule = _RULES.get(node.target) or _OURS.get(str(node.target))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _elementwise
    return None if rule is None else rule(node, arguments(node), dim)


def reader_dim(node: Node, operand: Node, dim: int) -> int | None:
    """The output's dimension that counts what an operand has at `dim`; None where `reads` never names that."""
    wanted = Read(operand, dim)
    return next((d for d in range(len(sizes_of(node))) if wanted in (reads(node, d) or ())), None)


def unordered(node: Node) -> tuple[tuple[Read, ...], ...]:
    """Groups of operands whose tokens a call sums up: in any order, as long as it is one order for a group."""
    if node.op != "call_function":
        return ()
    args = arguments(node)
    if node.target is SDPA and not args["is_causal"]:
        key, value, mask = args["key"], args["value"], args["attn_mask"]
        group = [Read(key, len(sizes_of(key)) - 2), Read(value, len(sizes_of(value)) - 2)]
        if mask is not None and same_size(sizes_of(mask)[-1], sizes_of(key)[-2]):
            group.append(Read(mask, len(sizes_of(mask)) - 1))
        return (tuple(group),)
    if node.target in _REDUCTIONS and args["dim"]:
        source = _first(args)
        return tuple((Read(source, dim),) for dim in _own_dims(source, args["dim"]))
    return ()


def values_read(node: Node, operand: Node) -> int:
    """As how many of its arguments a call reads the values of an operand, and not only its sizes and dtype."""
    found = [argument for argument in pytree.tree_leaves((node.args, dict(node.kwargs))) if argument is operand]
    if node.target in ALIKE or is_size(node):
        return 0
    # type_as, view_as and the like: the second argument says what the first one is to become.
    return len(found) - (node.target in _AS_ANOTHER and node.args[1] is operand)


# ---- shapes and arguments


def sizes_of(node: Node) -> tuple[Any, ...]:
    """The sizes of a tensor, or of the first one where a call gives several."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _first(args: dict[str, Any]) -> Node:
    return next(value for value in args.values() if isinstance(value, Node))


def _operands(args: dict[str, Any]) -> list[Node]:
    return list(args["tensors"]) if "tensors" in args else [_first(args)]


def own_dim(node: Node, dim: int) -> int:
    """A dimension that an operator names, counted from the front."""
    return dim % max(len(sizes_of(node)), 1)


def _own_dims(node: Node, dims: int | Sequence[int]) -> set[int]:
    return {own_dim(node, dim) for dim in ([dims] if isinstance(dims, int) else dims)}


def _product(sizes: Iterable[Any]) -> Any:
    return reduce(operator.mul, sizes, 1)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


# ---- the rules


def _elementwise(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Operands are aligned from the right; of size 1, or without the dimension, they are the same for all tokens."""
    rank, length = len(sizes_of(node)), sizes_of(node)[dim]
    found = []
    for value in args.values():
        if isinstance(value, list | tuple) and any(map(_is_tensor, value)):
            return None
        if not (isinstance(value, Node) and _is_tensor(value)):
            continue
        own = dim - rank + len(sizes_of(value))
        if own < 0 or (same_size(sizes_of(value)[own], 1) and not same_size(length, 1)):
            continue
        if not same_size(sizes_of(value)[own], length):
            return None
        found.append(Read(value, own))
    return tuple(found)


def _same(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """The first operand's values with its own shape; what others are there for is not their values."""
    return (Read(_first(args), dim),)


def _alike(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    return ()


def _reshaped(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """A dimension comes through a reshape where an equal one has as many elements before it."""
    source, length, before = _first(args), sizes_of(node)[dim], _product(sizes_of(node)[:dim])
    old = sizes_of(source)
    for own, size in enumerate(old):
        if same_size(size, length) and same_size(_product(old[:own]), before):
            return (Read(source, own),)
    return None


def _reordered(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    source = _first(args)
    places = list(range(len(sizes_of(source))))
    if "dims" in args:
        places = [own_dim(source, place) for place in args["dims"]]
    elif len(places) > 1:
        first, second = (own_dim(source, args.get(name, index)) for index, name in enumerate(("dim0", "dim1")))
        places[first], places[second] = places[second], places[first]
    return (Read(source, places[dim]),)


def _without(removed: Callable[[Node, dict[str, Any]], set[int]]) -> _Rule:
    """The output lacks some of the operand's dimensions."""

    def rule(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
        source = _first(args)
        gone = removed(source, args)
        kept = [own for own in range(len(sizes_of(source))) if own not in gone]
        return (Read(source, kept[dim]),)

    return rule


def _squeezed(source: Node, args: dict[str, Any]) -> set[int]:
    sizes = sizes_of(source)
    asked = _own_dims(source, args["dim"]) if "dim" in args else set(range(len(sizes)))
    return {dim for dim in asked if same_size(sizes[dim], 1)}


def _reduced(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Sums and the like over other dimensions."""
    source = _first(args)
    gone = _own_dims(source, args["dim"]) if args["dim"] else set(range(len(sizes_of(source))))
    if args["keepdim"]:
        return None if dim in gone else (Read(source, dim),)
    return _without(lambda source, args: gone)(node, args, dim)


def _added_dim(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Unsqueeze and stack: the output has one dimension more."""
    own = args["dim"] % len(sizes_of(node))
    if dim == own:
        return None
    return tuple(Read(operand, dim if dim < own else dim - 1) for operand in _operands(args))


def _expanded(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Expand and repeat: dimensions of size 1, and new ones, are alike everywhere."""
    source = _first(args)
    own = dim - len(sizes_of(node)) + len(sizes_of(source))
    if own < 0 or same_size(sizes_of(source)[own], 1):
        return ()
    return (Read(source, own),) if same_size(sizes_of(source)[own], sizes_of(node)[dim]) else None


def _beside(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Operators that work along dimensions of their own, and treat what lies beside as they find it."""
    operands = _operands(args)
    own = args["dims"] if "dims" in args else args["dim"]
    if own is None or own == [] or dim in _own_dims(operands[0], own):
        return None
    return tuple(Read(operand, dim) for operand in operands if len(sizes_of(operand)) > dim)


def _scattered(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Slice_scatter and select_scatter: a source is written into a part of the first operand."""
    whole, part = args["self"], args["src"]
    own = own_dim(whole, args["dim"])
    if dim == own:
        return None
    lower = node.target is aten.select_scatter.default and dim > own
    return (Read(whole, dim), Read(part, dim - lower))


def _features(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Linear and the like: the last dimension is mixed, the others are not."""
    return (Read(_first(args), dim),) if dim < len(sizes_of(node)) - 1 else None


def _normalized(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    source = _first(args)
    kept = len(sizes_of(source)) - len(args["normalized_shape"])
    return (Read(source, dim),) if dim < kept else None


def _looked_up(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    indices = args["indices"]
    return (Read(indices, dim),) if dim < len(sizes_of(indices)) else None


def _multiplied(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Rows of the left operand, columns of the right one, batches of both."""
    left, right = (value for value in args.values() if isinstance(value, Node))
    rank = len(sizes_of(node))
    if min(len(sizes_of(left)), len(sizes_of(right))) < 2:
        return None
    if dim == rank - 2:
        return (Read(left, len(sizes_of(left)) - 2),)
    if dim == rank - 1:
        return (Read(right, len(sizes_of(right)) - 1),)
    return _elementwise(node, args, dim)


def _attended(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """The query side of attention, and of its mask where each query has its own."""
    query, mask = args["query"], args["attn_mask"]
    if dim != len(sizes_of(node)) - 2 or args["is_causal"]:
        return None
    own = (Read(query, len(sizes_of(query)) - 2),)
    if mask is None or len(sizes_of(mask)) < 2 or same_size(sizes_of(mask)[-2], 1):
        return own
    return (*own, Read(mask, len(sizes_of(mask)) - 2)) if same_size(sizes_of(mask)[-2], sizes_of(node)[dim]) else None


def _beside_padding(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    """Amounts are given for the last dimensions, from the last one on, before and after."""
    place = 2 * (len(sizes_of(node)) - 1 - dim)
    return (
        (Read(_first(args), dim),) if all(same_size(amount, 0) for amount in args["pad"][place : place + 2]) else None
    )


def _part_of(node: Node, args: dict[str, Any], dim: int) -> tuple[Read, ...] | None:
    whole = node.args[0]
    return (Read(whole, dim),) if isinstance(whole, Node) else None


_Rule = Callable[[Node, dict[str, Any], int], tuple[Read, ...] | None]

SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
_REDUCTIONS = frozenset(
    {
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
        aten.var.correction,
        aten.linalg_vector_norm.default,
    }
)
ALIKE = frozenset(
    {
        aten.empty_like.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_empty.default,
        aten.new_full.default,
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.empty.memory_format,
    }
)
"""Operators whose output has the same value, or none that counts, at all places."""

_AS_ANOTHER = frozenset({aten.type_as.default, aten.expand_as.default, aten.view_as.default, aten.reshape_as.default})

_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(ALIKE, _alike),
    **dict.fromkeys(RESHAPES, _reshaped),
    **dict.fromkeys((*CASTS, aten.clone.default, aten.contiguous.default, aten.alias.default), _same),
    **dict.fromkeys((aten.detach.default, aten.type_as.default, aten.dropout.default), _same),
    # Elementwise, though not tagged so.
    **dict.fromkeys((aten.copy.default, aten.masked_fill.Tensor, aten.__and__.Tensor), _elementwise),
    **dict.fromkeys((aten.__or__.Tensor, aten.complex.default, aten.polar.default), _elementwise),
    aten.transpose.int: _reordered,
    aten.permute.default: _reordered,
    aten.t.default: _reordered,
    aten.select.int: _without(lambda source, args: {own_dim(source, args["dim"])}),
    aten.unbind.int: _without(lambda source, args: {own_dim(source, args["dim"])}),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), _without(_squeezed)),
    aten.view_as_complex.default: _without(lambda source, args: {len(sizes_of(source)) - 1}),
    aten.view_as_real.default: _features,
    aten.unsqueeze.default: _added_dim,
    aten.stack.default: _added_dim,
    aten.expand.default: _expanded,
    aten.repeat.default: _expanded,
    **dict.fromkeys((*SPLITS, aten.slice.Tensor, aten.cat.default, aten.index_select.default), _beside),
    **dict.fromkeys((aten.softmax.int, aten.cumsum.default, aten.flip.default, aten.roll.default), _beside),
    **dict.fromkeys((aten.repeat_interleave.self_int, aten.glu.default), _beside),
    **dict.fromkeys((aten.slice_scatter.default, aten.select_scatter.default), _scattered),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _beside_padding),
    **dict.fromkeys((aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default), _normalized),
    aten.linear.default: _features,
    aten.embedding.default: _looked_up,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _multiplied),
    SDPA: _attended,
    operator.getitem: _part_of,
}

_OURS: dict[str, _Rule] = {"graphwright.int8_linear.default": _features}
"""Operators of this package, by name: patterns import no kernels."""
