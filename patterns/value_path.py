"""The way of an attention's values through head space: from the projection that makes them to the one that reads them.

    x ── linear(Wv) ── view, transpose ── (cache write) ── sdpa ── transpose, view ── linear(Wo)

Where nothing but layout lies on it, any invertible map of a key-value head may be folded into both weights (R2 of the
papers). Layouts are proved on indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from .attention import AttentionSite
from .flow import LINEAR
from .graph import GraphView, Refusal
from .nodes import RESHAPES, aten, is_call, shape_of
from .residual import is_size_query, live_nodes

_LAYOUT = RESHAPES | {aten.transpose.int, aten.permute.default, aten.clone.default, aten.contiguous.default}


@dataclass(frozen=True)
class ValuePath:
    """The two linears of one attention's values.

    Attributes:
        value: Makes [.., kv_heads * head_dim].
        output: Reads [.., heads * head_dim].
        kv_heads, heads, head_dim: How both are laid out.
    """

    value: Node
    output: Node
    kv_heads: int
    heads: int
    head_dim: int


_WRITES = {aten.index_copy.default: 3, aten.slice_scatter.default: 1, aten.index_put.default: 2}
"""Writes to a static cache, and the position of what is written."""


def new_operand(view: GraphView, attention: Node, operand: Node) -> Node | Refusal:
    """The new keys or values of an attention, which may be written to a static cache that starts empty.

    Refused, with the fact: a cache that is no state of the program or that does not start as zeros; anyone but the
    attention and the write who reads the new tensor, or but the attention who reads the cache.
    """
    new = operand.args[_WRITES[operand.target]] if is_call(operand, *_WRITES) else operand  # pyright: ignore[reportArgumentType]
    assert isinstance(new, Node)
    alive = live_nodes(view)
    for user in _readers(new, alive):
        if user is attention:
            continue
        if not is_call(user, *_WRITES) or user.args[_WRITES[user.target]] is not new:  # pyright: ignore[reportArgumentType]
            return view.refuse(attention, "something else reads the new keys or values", reader=user.name)
        buffer = user.args[0]
        stored = view.stored(str(view.target(buffer))) if isinstance(buffer, Node) and view.is_state(buffer) else None
        if stored is None:
            return view.refuse(attention, "the cache is handed to the caller", write=user.name)
        if bool(stored.any()):
            return view.refuse(attention, "the cache does not start as zeros", write=user.name)
        others = [reader for reader in _readers(user, alive) if reader is not attention and reader.op != "output"]
        if others:
            return view.refuse(attention, "something else reads the cache", reader=others[0].name)
    return new


def find_value_path(view: GraphView, site: AttentionSite) -> ValuePath | Refusal:
    """Prove that an attention's values stay in their heads between two linears.

    Refused, with the fact: what `new_operand` refuses; anything but layout on the way, such as a norm of values, a cap
    or a gate; values that someone else reads; projections that share a linear.
    """
    made = new_operand(view, site.node, site.value)
    if isinstance(made, Refusal):
        return made
    alive = live_nodes(view)
    node = made
    while is_call(node, *_LAYOUT):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
        assert isinstance(node, Node)
        if len(_readers(node, alive)) != 1:
            return view.refuse(site.node, "the values' projection is read twice", depth=2, projection=node.name)
    if not is_call(node, LINEAR):
        return view.refuse(site.node, "the values are changed in head space", depth=3, operator=str(node.target))
    value_dim = shape_of(made)[-1]
    heads, kv_heads = site.heads, site.kv_heads

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (kv_heads, value_dim)).transpose(1, 2)

    if not view.is_layout_of(made, node, split):
        return view.refuse(site.node, "the values' heads are laid out in another way", depth=4)
    last = output = site.node
    while not is_call(output, LINEAR):
        readers = _readers(output, alive)
        if len(readers) != 1 or not is_call(readers[0], LINEAR, *_LAYOUT):
            reader = str(readers[0].target) if readers else "none"
            return view.refuse(site.node, "the output is changed in head space", depth=5, operator=reader)
        last, output = output, readers[0]
    joined = output.args[0]
    if joined is not last or not view.is_layout_of(last, site.node, lambda x: x.transpose(1, 2).flatten(2)):
        return view.refuse(site.node, "the output's heads are laid out in another way", depth=6)
    for linear in (node, output):
        weight = linear.args[1]
        if not isinstance(weight, Node) or not view.is_weight(weight):
            return view.refuse(site.node, "a projection's weight is computed", depth=7, projection=linear.name)
    return ValuePath(node, output, kv_heads, heads, int(value_dim))


def _readers(node: Node, alive: set[Node]) -> list[Node]:
    return [user for user in node.users if user in alive and not is_size_query(user)]


def per_head(rotation: Tensor, heads: int) -> Tensor:
    """The rotations [kv_heads, e, e] repeated for query heads [heads, e, e]: head j uses that of j // (heads / kv)."""
    return torch.repeat_interleave(rotation, heads // len(rotation), 0)
