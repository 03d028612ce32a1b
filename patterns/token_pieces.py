"""Cuts and joins of tokens: what the tokens of a tensor were put together from, where that is only moving them.

cat([a, b], 1)    slice(x, 1, 3, 9)    split(x, [2, 7], 1)[1]    slice_scatter(x, a, 1, 3)    pad(x, [0, 0, 0, 4])
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch.fx import Node

from .nodes import arguments, aten, is_call, same_size
from .token_axis import SPLITS, own_dim, sizes_of


class Piece(NamedTuple):
    """Tokens `start` to `start + length` of an operand; the operand is None where the tokens are padding."""

    operand: Node | None
    dim: int
    start: Any
    length: Any


def pieces(node: Node, dim: int) -> tuple[Piece, ...] | None:
    """What an output's tokens are put together from, in order; None where the operator does not cut or join there."""
    if node.op != "call_function":
        return None
    args = arguments(node)
    if node.target is aten.cat.default and args["dim"] % len(sizes_of(node)) == dim:
        parts = [part for part in args["tensors"] if len(sizes_of(part)) > dim]
        return tuple(Piece(part, dim, 0, sizes_of(part)[dim]) for part in parts)
    if node.target is aten.slice.Tensor and own_dim(args["self"], args["dim"]) == dim and args["step"] == 1:
        start, length = _number(args["start"] or 0), sizes_of(node)[dim]
        if isinstance(start, int) and start < 0:
            start = sizes_of(args["self"])[dim] + start
        return (Piece(args["self"], dim, start, length),)
    if node.target is aten.slice_scatter.default and own_dim(args["self"], args["dim"]) == dim and args["step"] == 1:
        start, length = _number(args["start"] or 0), sizes_of(args["src"])[dim]
        if isinstance(start, int) and start < 0:
            start = sizes_of(node)[dim] + start
        end = start + length
        parts = (
            Piece(args["self"], dim, 0, start),
            Piece(args["src"], dim, 0, length),
            Piece(args["self"], dim, end, sizes_of(node)[dim] - end),
        )
        return tuple(part for part in parts if not same_size(part.length, 0))
    if node.target in (aten.constant_pad_nd.default, aten.pad.default):
        return _padded(node, args, dim)
    return _split_off(node, dim) if node.target is operator.getitem else None


def _padded(node: Node, args: dict[str, Any], dim: int) -> tuple[Piece, ...] | None:
    source = args["self"]
    pair = 2 * (len(sizes_of(source)) - 1 - dim)
    amounts = [_number(amount) for amount in args["pad"][pair : pair + 2]]
    if not amounts or args.get("mode", "constant") != "constant":
        return None
    before, after = amounts
    # A pad that is known to be negative cuts; one that is not known to be positive is taken as it is meant.
    if any(isinstance(amount, int) and amount < 0 for amount in amounts):
        return None
    ends = [Piece(None, dim, 0, amount) for amount in (before, after)]
    parts = (ends[0], Piece(source, dim, 0, sizes_of(source)[dim]), ends[1])
    return tuple(part for part in parts if not same_size(part.length, 0))


def _split_off(node: Node, dim: int) -> tuple[Piece, ...] | None:
    whole, index = node.args
    if not (isinstance(whole, Node) and isinstance(index, int) and is_call(whole, *SPLITS)):
        return None
    args = arguments(whole)
    if own_dim(args["self"], args["dim"]) != dim:
        return None
    lengths = [part.shape[dim] for part in whole.meta["val"]]
    return (Piece(args["self"], dim, sum(lengths[:index]), lengths[index]),)


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value
