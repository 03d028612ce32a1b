"""The tensors of a graph that hold the tokens of an attention, and in which order each of their readers may take them.

    order [0, P)   a permutation of all tokens that attentions ask for
    stream         every tensor along one dimension of which those tokens lie, all of them or a run of neighbours

A tensor of the stream is either as the model has it, or *ordered*: its tokens are in the order in which `order` names
them. Readers that treat tokens one by one (`token_axis.py`), that cut and join them (`token_pieces.py`) or that sum
them up take either; what else reads the stream takes it as the model has it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from .graph import GraphView
from .nodes import arguments, aten, is_call
from .token_axis import Read, reader_dim, reads, sizes_of, unordered, values_read
from .token_pieces import Piece, pieces


class Place(NamedTuple):
    """Where a tensor has tokens of the stream: tokens `start` to `start + length` of the whole, along `dim`."""

    dim: int
    start: int
    length: int


class Part(NamedTuple):
    """A run of an operand's tokens as it lies in a joined tensor: from `start` of the operand, `length` tokens."""

    operand: Node
    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class Reader:
    """What reads a tensor of the stream, and has one order for all that it reads.

    Attributes:
        node: The reading call.
        kind: `tokens` where its output belongs to the stream and has the same order; `summed` where order does not
            count as long as all operands of group `group` share it; `gather` where it picks neighbours of the ordered
            stream; `model` where it takes the model's order only.
    """

    node: Node
    kind: str
    group: int = 0


class TokenStream:
    """Finds the stream around some attentions.

    Args:
        view: The graph; all sizes along the stream must be fixed.
        order: int64 [N], a permutation of the tokens.
        attentions: The calls that ask for it: queries, keys and values [B, H, N, D], bias of keys [B, H, N].

    Attributes:
        places: Tensor -> where it has tokens.
        pinned: Tensors that can only be had in the model's order.
    """

    def __init__(self, view: GraphView, order: Tensor, attentions: Sequence[Node]) -> None:
        self.view = view
        self.places: dict[Node, Place] = {}
        self.pinned: set[Node] = set()
        self._order = order.cpu()
        self._attentions = set(attentions)
        self._constants = _constants(view)
        self._orders: dict[tuple[int, int], Tensor] = {}
        self._operands: dict[Node, tuple[Read, ...]] = {}
        self._queue: list[Node] = []
        for attention in attentions:
            self._claim(attention, Place(2, 0, len(order)))
        while self._queue:
            self._explore(self._queue.pop())

    def order_of(self, place: Place) -> Tensor:
        """int64 [length]: which token of a tensor stands at each place once it is ordered."""
        key = place.start, place.length
        if key not in self._orders:
            inside = (self._order >= place.start) & (self._order < place.start + place.length)
            self._orders[key] = self._order[inside] - place.start
        return self._orders[key]

    def is_free(self, node: Node) -> bool:
        """Whether a tensor of the stream is the same in both orders."""
        place = self.places[node]
        order = self.order_of(place)
        return torch.equal(order, torch.arange(len(order))) or reads(node, place.dim) == ()

    def is_constant(self, node: Node) -> bool:
        """Whether a tensor of the stream is known before the program runs."""
        return node in self._constants

    def gathers(self) -> int:
        """How many calls pick neighbours of the ordered stream, by a part of the order."""
        picks = ((node, user) for node in self.places for user in node.users)
        return sum(self.gathered(node, user) is not None for node, user in picks)

    def operands(self, node: Node) -> tuple[Read, ...]:
        """What a tensor of the stream is made of, token by token."""
        if node not in self._operands:
            self._operands[node] = self._read(node, self.places[node])
        return self._operands[node]

    def _read(self, node: Node, place: Place) -> tuple[Read, ...]:
        if node in self._attentions:
            args = arguments(node)
            found = [args["query"], args["key"], args["value"], args["key_bias"]]
            return tuple(Read(operand, 2) for operand in found if operand is not None)
        cut = self._cut(node, place)
        if cut is not None:
            return tuple(Read(operand, piece.dim) for operand, piece in cut)
        return reads(node, place.dim) or ()

    def parts(self, node: Node, ordered: bool) -> tuple[Part, ...] | None:
        """How a tensor is cut from, or joined of, its operands, all of them in its own order; None where it is not."""
        place = self.places[node]
        cut = self._cut(node, place)
        if cut is None:
            return None
        found: list[tuple[int, Part]] = []
        offset = 0
        for operand, piece in cut:
            tokens = Place(piece.dim, place.start + offset, piece.length)
            start, to = piece.start, offset
            if ordered:
                start, to = self._run(tokens, self.places[operand]), self._run(tokens, place)
                assert start is not None
                assert to is not None
            found.append((to, Part(operand, piece.dim, start, piece.length)))
            offset += piece.length
        return tuple(part for _, part in sorted(found, key=lambda item: item[0]))

    def readers(self, node: Node) -> tuple[Reader, ...]:
        """Who reads a tensor of the stream, and how."""
        found: dict[Reader, None] = {}
        for user in self.users(node):
            for reader in self.roles(node, user):
                found[reader] = None
        return tuple(found)

    def roles(self, node: Node, user: Node) -> tuple[Reader, ...]:
        """How one call reads a tensor of the stream; in several ways where the tensor is several of its operands."""
        if user.op == "output":
            return (Reader(user, "model"),)
        place, found = self.places[node], []
        counted = values_read(user, node)
        if user in self.places and Read(node, place.dim) in self.operands(user):
            found.append(Reader(user, "tokens"))
            counted -= 1 if self._is_cut(user) else self.operands(user).count(Read(node, place.dim))
        for number, group in enumerate(unordered(user)):
            if Read(node, place.dim) in group:
                known = all(self.places.get(read.operand) == place._replace(dim=read.dim) for read in group)
                found.append(Reader(user, "summed" if known else "model", number))
                counted -= group.count(Read(node, place.dim))
        if not found and self.gathered(node, user) is not None:
            return (Reader(user, "gather"),)
        if counted > 0:
            found.append(Reader(user, "model"))
        return tuple(found)

    def gathered(self, node: Node, user: Node) -> int | None:
        """First place of the ordered tensor from which a call picks neighbours, by a part of the order as its index."""
        if not is_call(user, aten.index_select.default) or user.args[0] is not node:
            return None
        place, (_, dim, index) = self.places[node], user.args
        if not isinstance(index, Node) or index not in self._constants or dim != place.dim:
            return None
        picked, order = self.constant(index).cpu().long(), self.order_of(place)
        if not len(picked):
            return None
        start = int((order == picked[0]).nonzero()[0]) if (order == picked[0]).any() else 0
        return start if torch.equal(order[start : start + len(picked)], picked) else None

    def constant(self, node: Node) -> Tensor:
        """The value of a tensor that is known before the program runs."""
        return self.view.evaluate(node, {}, {})

    # ---- finding it

    def _explore(self, node: Node) -> None:
        place = self.places[node]
        if node in self._constants:
            self.pinned.add(node)
            return
        cut = self._cut(node, place)
        if cut is not None:
            offset = 0
            for operand, piece in cut:
                start = place.start + offset - piece.start
                self._claim_for(node, operand, Place(piece.dim, start, sizes_of(operand)[piece.dim]))
                offset += piece.length
            if node not in self.pinned and not self._can_be_cut(node, place):
                self.pinned.add(node)
        elif node in self._attentions or reads(node, place.dim) is not None:
            for operand, dim in self.operands(node):
                self._claim_for(node, operand, place._replace(dim=dim))
        else:
            self.pinned.add(node)
        for user in self.users(node):
            self._explore_user(node, place, user)

    def _explore_user(self, node: Node, place: Place, user: Node) -> None:
        if user.op == "output" or user in self._attentions:
            return
        for group in unordered(user):
            if Read(node, place.dim) in group:
                for operand, dim in group:
                    self._claim(operand, place._replace(dim=dim))
        dim = reader_dim(user, node, place.dim)
        if dim is not None:
            self._claim(user, place._replace(dim=dim))
            return
        cut = pieces(user, place.dim) or ()
        offset = 0
        for piece in cut:
            if piece.operand is node and piece.dim == place.dim and _is_fixed(piece):
                length = sizes_of(user)[place.dim]
                self._claim(user, Place(place.dim, place.start + piece.start - offset, length))
                return
            offset = offset + piece.length

    def _claim_for(self, node: Node, operand: Node, place: Place) -> None:
        """Say where an operand has tokens; what reads one that has others too is left as the model has it."""
        if not self._claim(operand, place):
            self.pinned.add(node)

    def _claim(self, node: Node, place: Place) -> bool:
        if not (isinstance(place.start, int) and isinstance(place.length, int)):
            return False
        if place.start < 0 or place.start + place.length > len(self._order):
            return False
        if node in self.places:
            if self.places[node] != place:
                self.pinned.add(node)
            return self.places[node] == place
        self.places[node] = place
        self._queue.append(node)
        return True

    def users(self, node: Node) -> list[Node]:
        """Who reads a tensor; of a split along its tokens, who takes the parts."""
        found: dict[Node, None] = {}
        for user in node.users:
            parts = [part for part in user.users if _splits_off(part, node, self.places[node].dim)]
            found |= dict.fromkeys(parts or [user])
        return list(found)

    # ---- cuts and joins

    def _cut(self, node: Node, place: Place) -> list[tuple[Node, Piece]] | None:
        cut = pieces(node, place.dim)
        if cut is None or not all(map(_is_fixed, cut)):
            return None
        return [(piece.operand, piece) for piece in cut if piece.operand is not None]

    def _is_cut(self, node: Node) -> bool:
        return node not in self._attentions and self._cut(node, self.places[node]) is not None

    def _can_be_cut(self, node: Node, place: Place) -> bool:
        """Whether the tokens of each part are neighbours in the ordered operand and in the ordered result."""
        offset = 0
        for operand, piece in self._cut(node, place) or ():
            tokens = Place(piece.dim, place.start + offset, piece.length)
            if self._run(tokens, self.places[operand]) is None or self._run(tokens, place) is None:
                return False
            offset += piece.length
        return True

    def _run(self, tokens: Place, whole: Place) -> int | None:
        """At which place of the ordered whole some neighbouring tokens begin, where they are neighbours there too."""
        order = self.order_of(whole) + whole.start
        inside = ((order >= tokens.start) & (order < tokens.start + tokens.length)).nonzero().flatten()
        if len(inside) != tokens.length:
            return None
        if not len(inside):
            return 0
        return int(inside[0]) if int(inside[-1] - inside[0]) == len(inside) - 1 else None


def _is_fixed(piece: Piece) -> bool:
    return piece.operand is not None and isinstance(piece.start, int) and isinstance(piece.length, int)


def _splits_off(part: Node, source: Node, dim: int) -> bool:
    """Whether a call takes a part of what was split along the tokens."""
    cut = pieces(part, dim) if is_call(part, operator.getitem) else None
    return cut is not None and cut[0].operand is source


def _constants(view: GraphView) -> set[Node]:
    """The tensors that are computed from weights and numbers alone, the same in each call."""
    found: set[Node] = set()
    for node in view.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            constant = view.tensor(node) is not None
        elif node.op == "call_function":
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            constant = not random and all(parent in found for parent in node.all_input_nodes)
        else:
            continue
        leaves = value if isinstance(value, list | tuple) else [value]
        fixed = all(isinstance(leaf, Tensor) and all(isinstance(size, int) for size in leaf.shape) for leaf in leaves)
        if constant and fixed:
            found.add(node)
    return found
