"""Bring the model's own tokens into the order that sparse attentions ask for, once, instead of in each attention.

    x ── blocks with block_sparse_attention(.., order) ── y

becomes

    x ── index_select(order) ── blocks with block_sparse_attention(..) ── index_select(inverse) ── y

Between the two everything treats tokens one by one, so it does not matter in which order they are; tables of positions
are stored in the other order. What stays in the model's order, and where tensors are permuted, is the cheapest choice
(`order_cut.py`), which may be to leave an attention as it is. Exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..patterns.graph import GraphView, Refusal
from ..patterns.nodes import arguments, aten, is_call, shape_of
from ..patterns.token_stream import Part, TokenStream
from .base import Pass, PassResult
from .edit import Edit
from .order_cut import bytes_of, ordered_side, side_of

_ATTENTIONS = frozenset(
    {"graphwright.block_sparse_attention.default", "graphwright.block_sparse_attention_lse.default"}
)
_TENSORS = ("query", "key", "value", "counts", "blocks", "pattern", "order", "key_bias")
_IN_ATTENTION = 4
"""Permutations in an attention that holds an order: of query, key, value and output."""


@dataclass(frozen=True)
class HoistOrder(Pass):
    """Permute the token stream at its ends."""

    name: ClassVar[str] = "hoist_order"
    requires: ClassVar[str] = "optimized"
    ensures: ClassVar[str] = "optimized"

    def run(self, edit: Edit) -> PassResult:
        """Take each order in turn, those that move most first; each finds the others' attentions as they are.

        Returns:
            The number of permutations that are gone. The first refusal says how many remain of how many there were,
            and the others which attentions keep their order, and why.
        """
        groups, refusals = _by_order(edit.view)
        before = _IN_ATTENTION * (len(refusals) + sum(len(attentions) for _, attentions in groups))
        removed = 0
        for order, attentions in groups:
            edit.finish()  # drops what the group before has replaced, so that it does not count as a reader
            stream = TokenStream(edit.view, order, attentions)
            before += stream.gathers()
            ordered = ordered_side(stream, attentions)
            kept = [attention for attention in attentions if attention not in ordered]
            reason = "permuting inside the attention moves fewer bytes than permuting the tokens around it"
            refusals += [edit.view.refuse(attention, reason) for attention in kept]
            if len(kept) < len(attentions):
                removed += _Hoist(edit, stream, ordered).apply()
        if before:
            refusals.insert(0, Refusal("", f"{before - removed} permutations remain of {before}", {}))
        return PassResult(removed, tuple(refusals))


@dataclass(frozen=True)
class _Step:
    """What is to become of a call, in terms of the graph as it was.

    Attributes:
        given: Operand of the stream -> whether the call reads it in order.
        parts: How the call cuts or joins its operands, None where it does neither.
        gathers: The run of the ordered operand that the call picks, None where it picks none.
        attends: Whether it is an attention that no longer needs its order.
    """

    given: Mapping[Node, bool]
    parts: tuple[Part, ...] | None = None
    gathers: Part | None = None
    attends: bool = False


class _Hoist:
    """Rewrites a stream so that one side of it is in another order."""

    def __init__(self, edit: Edit, stream: TokenStream, ordered: set[Hashable]) -> None:
        self.edit, self.stream, self.ordered = edit, stream, ordered
        self.inserted = 0
        self._now: dict[Node, Node] = {}
        self._returned: dict[Node, Node] = {}
        self._made: dict[tuple[Node, bool], Node] = {}
        self._free = {node for node in stream.places if stream.is_free(node)}
        self._start = next(node for node in edit.graph.nodes if node.op != "placeholder")

    def apply(self) -> int:
        """Rewrite, and count the permutations that are gone less those that are new."""
        nodes, steps = list(self.edit.graph.nodes), self._plan()
        for node in nodes:
            if node in steps:
                self._rewrite(node, steps[node])
            if node in self.stream.places:
                self._return(node)
        removed = sum(_IN_ATTENTION * step.attends + (step.gathers is not None) for step in steps.values())
        return removed - self.inserted

    def _plan(self) -> dict[Node, _Step]:
        given: dict[Node, dict[Node, bool]] = {}
        gathers: dict[Node, Part] = {}
        for node, place in self.stream.places.items():
            for user in self.stream.users(node):
                roles = self.stream.roles(node, user)
                if user.op != "call_function" or not roles:
                    continue
                given.setdefault(user, {})[node] = side_of(roles[0]) in self.ordered
                if roles[0].kind == "gather" and roles[0] in self.ordered:
                    start = self.stream.gathered(node, user)
                    assert start is not None
                    gathers[user] = Part(node, place.dim, start, shape_of(user)[place.dim])
        steps = {}
        for node, operands in given.items():
            inside, parts = node in self.stream.places, None
            if inside:
                parts = self.stream.parts(node, node in self.ordered)
            attends = str(node.target) in _ATTENTIONS and node in self.ordered
            steps[node] = _Step(operands, parts, gathers.get(node), attends)
        return steps

    def _rewrite(self, node: Node, step: _Step) -> None:
        """Let a call read each operand in the order that it is to have."""
        self.edit.provenance = dict(node.meta.get("graphwright", {"pass": HoistOrder.name}))
        given = {self._shown(operand): self._version(operand, ordered) for operand, ordered in step.given.items()}
        changed = any(shown is not wanted for shown, wanted in given.items())
        if step.attends:
            new = self._without_order(node, given)
        elif step.gathers is not None:
            new = self._run(step.gathers, ordered=True, like=node)
            self._reshape_views(node, new)
        elif step.parts is not None and (changed or node in self.ordered):
            runs = [self._run(part, ordered=node in self.ordered, like=node) for part in step.parts]
            new = runs[0] if len(runs) == 1 else self.edit.call(aten.cat.default, runs, step.parts[0].dim, like=node)
        elif changed:
            new = self._call(node, given)
        else:
            return
        self.edit.replace(node, new)
        self._now[node] = new

    def _call(self, node: Node, given: dict[Node, Node]) -> Node:
        inputs: Any = map_arg((node.args, node.kwargs), lambda argument: given.get(argument, argument))
        args, kwargs = inputs
        return self.edit.call(node.target, *args, like=node, **kwargs)

    def _without_order(self, node: Node, given: dict[Node, Node]) -> Node:
        named: Any = map_arg(arguments(node), lambda argument: given.get(argument, argument))
        args = [None if name == "order" else named[name] for name in _TENSORS]
        rest = {name: value for name, value in named.items() if name not in _TENSORS}
        return self.edit.call(node.target, *args, like=node, **rest)

    def _reshape_views(self, node: Node, new: Node) -> None:
        """A slice is not contiguous, as what was picked by an index is: what views it has to be allowed to copy."""
        for user in [user for user in node.users if is_call(user, aten.view.default, aten._unsafe_view.default)]:
            self.edit.replace(user, self.edit.call(aten.reshape.default, new, user.args[1], like=user))

    def _run(self, part: Part, *, ordered: bool, like: Node) -> Node:
        known = part.operand in self.stream.places
        source = self._version(part.operand, ordered) if known else self._now.get(part.operand, part.operand)
        if part.start == 0 and part.length == shape_of(source)[part.dim]:
            return source
        return self.edit.call(aten.slice.Tensor, source, part.dim, part.start, part.start + part.length, like=like)

    def _version(self, node: Node, ordered: bool) -> Node:
        """A tensor in one of the two orders."""
        now = self._now.get(node, node)
        if node in self._free or (node in self.ordered) == ordered:
            return now
        if (node, ordered) not in self._made:
            self._made[node, ordered] = self._constant(node) if self.stream.is_constant(node) else self._permuted(node)
        return self._made[node, ordered]

    def _permuted(self, node: Node) -> Node:
        """A tensor in the order that is not its own."""
        now, place = self._now.get(node, node), self.stream.places[node]
        order = self.stream.order_of(place)
        index = order.argsort() if node in self.ordered else order
        device = node.meta["val"].device
        stored = self.edit.buffer(f"token_index.{_digest(index)}", lambda: index.to(device))
        before = self._start if now.op == "placeholder" else now.next
        self.edit.provenance = {"pass": HoistOrder.name}
        self.inserted += 1
        return self.edit.call(aten.index_select.default, now, place.dim, stored, like=node, before=before)

    def _constant(self, node: Node) -> Node:
        """A stored tensor with its tokens in order."""
        place, value = self.stream.places[node], self.stream.constant(node)
        index = self.stream.order_of(place).to(value.device)
        name = self.edit.view.target(node) or "positions"
        return self.edit.buffer(
            f"{name}.ordered.{_digest(value, index)}", lambda: value.index_select(place.dim, index).contiguous()
        )

    def _shown(self, node: Node) -> Node:
        """What the readers of a tensor have as their argument."""
        return self._returned.get(node, self._now.get(node, node))

    def _return(self, node: Node) -> None:
        """What the program returns is in the model's order; all readers see that until they are rewritten."""
        now = self._now.get(node, node)
        returned = any(user.op == "output" for user in now.users)
        if returned and node in self.ordered and node not in self._free:
            permuted = self._version(node, ordered=False)
            self.edit.replace(now, permuted)
            self._returned[node] = permuted


def _by_order(view: GraphView) -> tuple[list[tuple[Tensor, list[Node]]], list[Refusal]]:
    """The attentions of each order, int64 [N], and why others keep theirs."""
    groups: dict[bytes, tuple[Tensor, list[Node]]] = {}
    refusals = []
    for node in view.graph.nodes:
        if node.op != "call_function" or str(node.target) not in _ATTENTIONS or arguments(node)["order"] is None:
            continue
        order = _permutation(view, node)
        if isinstance(order, Refusal):
            refusals.append(order)
        else:
            groups.setdefault(order.numpy().tobytes(), (order, []))[1].append(node)
    by_size = sorted(groups.values(), key=lambda group: -sum(map(bytes_of, group[1])))
    return by_size, refusals


def _permutation(view: GraphView, attention: Node) -> Tensor | Refusal:
    args = arguments(attention)
    tokens, stored = shape_of(args["query"])[2], view.tensor(args["order"])
    if not isinstance(tokens, int):
        return view.refuse(attention, "the number of tokens is dynamic", tokens=tokens)
    if stored is None:
        return view.refuse(attention, "the order of its tokens is computed when the program runs")
    if stored.shape[0] != 1:
        return view.refuse(attention, "its heads have orders of their own", orders=stored.shape[0])
    order = stored[0].cpu().long()
    if not torch.equal(order.sort().values, torch.arange(tokens)):
        return view.refuse(attention, "its order has empty positions", positions=len(order), tokens=tokens)
    return order


def _digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        found.update(real.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]
