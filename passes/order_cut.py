"""Which tensors of a token stream are best kept in another order: a minimum cut.

    minimise    2 * bytes of each tensor that is needed in both orders   (a permutation reads and writes it)
              +     bytes of what an attention gathers and scatters     (where it keeps the order to itself)

Every tensor of the stream and every reader that takes either order is on one side, `model` or `ordered`. A tensor
whose reader is on the other side is permuted once for all of these. Tensors that are known before the program runs are
permuted then, which costs their storage only.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import pairwise
from math import prod

import networkx as nx
from torch import Tensor
from torch.fx import Node

from ..patterns.token_stream import Reader, TokenStream

_MODEL, _ORDERED = "model", "ordered"
_MOVED = 2000
"""Cost of a byte that is permuted when the program runs."""
_GATHERED = 1000
"""Cost of a byte that an operator reads or writes out of order: it would read or write it anyway."""
_STORED = 1
"""Cost of a byte that is stored a second time; decides between equals only."""


def ordered_side(stream: TokenStream, attentions: Iterable[Node]) -> set[Hashable]:
    """The cheapest choice.

    Args:
        stream: The stream of the attentions.
        attentions: The calls that hold the order; those on the ordered side no longer need it.

    Returns:
        The tensors (nodes, attentions among them) and the `Reader`s on the ordered side.
    """
    network = nx.DiGraph()
    network.add_nodes_from((_MODEL, _ORDERED))
    for attention in attentions:
        moved = sum(map(bytes_of, (*(read.operand for read in stream.operands(attention)), attention)))
        network.add_edge(attention, _ORDERED, capacity=_GATHERED * moved)
    for node in stream.places:
        _add_tensor(network, stream, node)
    _, (_, ordered) = nx.minimum_cut(network, _MODEL, _ORDERED)
    return ordered - {_ORDERED}


def bytes_of(node: Node) -> int:
    """Bytes of a tensor, or of the tensors that a call gives."""
    value = node.meta.get("val")
    leaves = value if isinstance(value, list | tuple) else [value]
    return sum(prod(leaf.shape) * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def side_of(reader: Reader) -> Hashable:
    """What stands for a reader in the cut: the tensor that it makes, itself, or the model's side."""
    return {"tokens": reader.node, "model": _MODEL}.get(reader.kind, reader)


def _add_tensor(network: nx.DiGraph, stream: TokenStream, node: Node) -> None:
    if node in stream.pinned:
        network.add_edge(_MODEL, node)  # an edge without a capacity is never cut
    if stream.is_free(node):
        return
    sides: dict[Hashable, None] = {}
    for user in stream.users(node):
        roles = stream.roles(node, user)
        for reader in roles:
            sides[side_of(reader)] = None
            if reader.kind == "gather":
                network.add_edge(reader, _ORDERED, capacity=_MOVED * bytes_of(user))
        for first, second in pairwise(roles):
            # One call gets one tensor.
            network.add_edge(side_of(first), side_of(second))
            network.add_edge(side_of(second), side_of(first))
    if not sides:
        return
    cost = _cost(stream, node)
    for name, forward in (("to order", True), ("to model", False)):
        shared = (node, name)
        edges = [(node, shared, cost), *((shared, side, None) for side in sides)]
        for source, target, capacity in edges:
            ends = (source, target) if forward else (target, source)
            network.add_edge(*ends, **({} if capacity is None else {"capacity": capacity}))


def _cost(stream: TokenStream, node: Node) -> int | None:
    """Of permuting a tensor, None where it cannot be: a call that gives several tensors."""
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    if stream.is_constant(node):
        return _STORED * bytes_of(node)
    # Along the last dimension single elements move, not rows.
    last = stream.places[node].dim == node.meta["val"].dim() - 1
    return (2 if last else 1) * _MOVED * bytes_of(node)
