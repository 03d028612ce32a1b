"""The cut is the cheapest of all choices, by trying them all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from graphwright.passes.order_cut import bytes_of, ordered_side, side_of
from graphwright.patterns.graph import GraphView
from graphwright.patterns.nodes import arguments
from graphwright.patterns.token_stream import Reader, TokenStream
from tests.passes.test_hoist_order import small

GRAPHS = {
    "one": lambda m, x: m.attend(x),
    "narrow before": lambda m, x: m.attend(m.linear(x[..., :1].expand(-1, -1, 8) * x[..., :1])),
    "wide before": lambda m, x: m.attend(torch.cat([x, x], 2)[..., 4:12]),
    "mixed before": lambda m, x: m.attend(x.flip(1)),
    "mixed before, and after": lambda m, x: m.attend(x.flip(1)).flip(1),
    "two": lambda m, x: m.attend(m.attend(x)),
    "two with a mix between": lambda m, x: m.attend(m.attend(x).flip(1)),
    "gathered": lambda m, x: m.attend(x).mean(1) + x.index_select(1, m.order[0, :64]).mean(1),
    "read by both": lambda m, x: m.attend(x).flip(1) * m.attend(x).cos(),
}


def stream_of(function) -> tuple[TokenStream, list[Node]]:
    view = GraphView(small(function))
    attentions = [node for node in view.graph.nodes if "block_sparse_attention" in str(node.target)]
    order = view.tensor(arguments(attentions[0])["order"])
    assert isinstance(order, Tensor)
    return TokenStream(view, order[0].long(), attentions), attentions


def priced(stream: TokenStream, attentions: list[Node]) -> Callable[[set[Hashable]], float]:
    """What a choice costs, by the formula of the module; infinite where it cannot be."""
    kept = {a: sum(bytes_of(read.operand) for read in stream.operands(a)) + bytes_of(a) for a in attentions}
    tensors: list[tuple[Node, set[Hashable], float]] = []
    for node in stream.places:
        if stream.is_free(node):
            continue
        readers = stream.readers(node)
        kept |= {reader: 2 * bytes_of(reader.node) for reader in readers if reader.kind == "gather"}
        value = node.meta["val"]
        cost = float("inf")
        if isinstance(value, Tensor):
            last = stream.places[node].dim == value.dim() - 1
            cost = 0 if stream.is_constant(node) else (4 if last else 2) * bytes_of(node)
        tensors.append((node, {side_of(reader) for reader in readers}, cost))

    def price(ordered: set[Hashable]) -> float:
        permuted = sum(cost for node, sides, cost in tensors if any((s in ordered) != (node in ordered) for s in sides))
        return permuted + sum(cost for item, cost in kept.items() if item not in ordered)

    return price


@pytest.mark.parametrize("name", GRAPHS)
def test_no_choice_is_cheaper(name: str) -> None:
    stream, attentions = stream_of(GRAPHS[name])
    readers = {reader for node in stream.places for reader in stream.readers(node)}
    undecided: list[Hashable] = [node for node in stream.places if node not in stream.pinned]
    undecided += [reader for reader in readers if isinstance(side_of(reader), Reader)]
    assert 3 < len(undecided) < 17
    price = priced(stream, attentions)
    chosen = ordered_side(stream, attentions)
    assert not chosen & stream.pinned
    choices = itertools.product((False, True), repeat=len(undecided))
    assert price(chosen) == min(price(set(itertools.compress(undecided, choice))) for choice in choices)
