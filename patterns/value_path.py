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
from .cache import CacheSite, find_caches
from .flow import LINEAR
from .graph import RESHAPES, GraphView, Refusal, aten, is_call, shape_of
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


def caches_by_attention(view: GraphView) -> dict[Node, CacheSite]:
    """The cache of each attention that has one."""
    return {cache.node: cache for cache in find_caches(view).sites}


def find_value_path(view: GraphView, site: AttentionSite, caches: dict[Node, CacheSite]) -> ValuePath | Refusal:
    """Prove that an attention's values stay in their heads between two linears.

    Refused, with the fact: a growing cache, whose contents the caller sees; anything but layout on the way, such as a
    norm of values, a cap or a gate; values that someone else reads; projections that share a linear.
    """
    cache = caches.get(site.node)
    if cache is not None and cache.layout != "static":
        return view.refuse(site.node, "the cache is handed to the caller", layout=cache.layout)
    made = cache.new_value if cache is not None else site.value
    alive = live_nodes(view)
    users = {user for user in made.users if user in alive and not is_size_query(user)}
    allowed = {site.node} | ({cache.value_write} if cache is not None else set())
    if not users <= allowed:
        return view.refuse(site.node, "something else reads the values", depth=1, reader=str(next(iter(users - allowed))))
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
    output = site.node
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
