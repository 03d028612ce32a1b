"""Key-value caches: where the new keys and values of one attention are kept, and how they get there.

    static:   cache' = index_copy(cache, 2, positions, new)        sdpa(q, key', value')        cache := cache'
    growing:  cache' = cat(past, new, 2)                           sdpa(q, key', value')        return cache'

The matcher anchors on the writes and follows them forward to the attention. A half is a cache only if nothing but that
attention sees what it holds, so that a rewrite may store it in another form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from .attention_forms import SDPA
from .cache_writes import TOKENS, Layout, Write, cache_writes, what_is_written
from .graph import GraphView, Refusal
from .nodes import CASTS, VIEWS, arguments, aten, is_call, same_size, shape_of
from .site import Found, Ordinals, Site


@dataclass(frozen=True)
class CacheSite(Site):
    """The key-value cache of one attention; its node is that attention.

    Attributes:
        key_buffer, value_buffer: Placeholders [batch, kv_heads, length, head_dim].
        key_name, value_name: Fully qualified names of the buffers; names of the inputs where the cache grows.
        key_write, value_write: The caches after the write, same shape (longer where the cache grows).
        new_key, new_value: What is written, [batch, kv_heads, tokens, head_dim].
        positions: Where it is written: int64 [tokens], or the first position (a size or a number) where a slice is
            written; None where the cache grows.
        write_dim: The dimension of tokens, 2.
        head_dim, value_head_dim: Features of one key, of one value.
        length: Tokens that a static cache holds; None where it grows.
        reads: Whether the attention reads the whole cache or, as in a prefill, the new tokens only.
    """

    kind: ClassVar[str] = "cache"

    key_buffer: Node
    key_name: str
    value_buffer: Node
    value_name: str
    key_write: Node
    value_write: Node
    new_key: Node
    new_value: Node
    positions: Node | int | None
    write_dim: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    length: int | None
    layout: Layout
    reads: Literal["cache", "new"]

    @property
    def attention(self) -> Node:
        """The attention that the cache belongs to."""
        return self.node

    @property
    def dtype(self) -> torch.dtype:
        """Of the buffers."""
        return self.key_buffer.meta["val"].dtype

    def describe(self) -> dict[str, str]:
        """Facts for tables."""
        return {
            "layout": self.layout,
            "reads": "new tokens" if self.reads == "new" else "cache",
            "batch": str(shape_of(self.key_buffer)[0]),
            "kv_heads": str(self.kv_heads),
            "head_dim": str(self.head_dim),
            "length": str(self.length) if self.length is not None else "grows",
            "key": self.key_name,
            "value": self.value_name,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def find_caches(view: GraphView, phase: str = "main") -> Found[CacheSite]:
    """Find the key-value cache of every attention.

    Refused, with the fact: a buffer that is written twice, not by token positions, or read by something other than one
    attention (the reader is named); a key without its value; halves written at different positions.
    """
    refusals: list[Refusal] = []
    halves: dict[Node, dict[str, _Half]] = {}
    explained: set[Node] = set()  # attentions of which one half was refused already
    for write in cache_writes(view):
        half = _resolve(view, write)
        if isinstance(half, Refusal):
            refusals.append(half)
            explained.update(attention for attention, _, _ in _readers(write.node).attentions)
        else:
            halves.setdefault(half.attention, {})[half.operand] = half
    sites: list[CacheSite] = []
    ordinals = Ordinals(phase)
    for node in view.graph.nodes:
        if node not in halves:
            continue
        site_id = ordinals.next_id(view.module_path(node), CacheSite.kind)
        if len(halves[node]) == 1 and node in explained:
            continue
        site = _pair(view, node, halves[node], site_id)
        if isinstance(site, Refusal):
            refusals.append(site)
        else:
            sites.append(site)
    return Found(tuple(sites), tuple(refusals))


@dataclass(frozen=True)
class _Half:
    """The key or the value side of a cache, with the attention that it was followed to."""

    write: Write
    buffer: Node
    new: Node
    positions: Node | int | None
    attention: Node
    operand: str
    reads: Literal["cache", "new"]


@dataclass
class _Readers:
    """What a tensor reaches through views: attentions, by operand and the view that they read, and anything else."""

    attentions: list[tuple[Node, str, Node]] = field(default_factory=list)
    others: list[Node] = field(default_factory=list)


_STEPS = VIEWS | CASTS


def _resolve(view: GraphView, write: Write) -> _Half | Refusal:
    """Prove what one write does, and follow it to its attention."""
    node = write.node
    written = what_is_written(view, write)
    if isinstance(written, Refusal):
        return written
    buffer, new, positions = written
    early = _readers(buffer, skip=node)
    if early.attentions or early.others:
        reader = (early.others or [attention for attention, _, _ in early.attentions])[0]
        return _read_by(view, write, reader, "buffer is read before it is written")
    readers = _readers(node)
    if readers.others:
        return _read_by(view, write, readers.others[0], "buffer is read by something that is not its attention")
    reads: Literal["cache", "new"] = "cache"
    found = readers.attentions
    if not found:
        found, reads = _readers(new, skip=node).attentions, "new"
    if not found:
        return view.refuse(node, "no attention reads the buffer", depth=4, buffer=write.name)
    if len(found) > 1:
        names = ", ".join(f"{attention.name}.{operand}" for attention, operand, _ in found)
        return view.refuse(node, "buffer is read more than once", depth=5, buffer=write.name, readers=names)
    attention, operand, seen = found[0]
    if operand == "query":
        return _read_by(view, write, attention, "buffer is read as a query")
    if not _is_repeated(view, seen, node if reads == "cache" else new):
        return view.refuse(seen, "attention reads the cache in another layout", depth=6, buffer=write.name)
    return _Half(write, buffer, new, positions, attention, operand, reads)


def _read_by(view: GraphView, write: Write, reader: Node, reason: str) -> Refusal:
    return view.refuse(write.node, reason, depth=4, buffer=write.name, reader=reader.name, operator=str(reader.target))


def _readers(start: Node, skip: Node | None = None) -> _Readers:
    """Everything that reads a tensor through views, `skip` and what only asks for its sizes left out."""
    found = _Readers()
    stack = [start]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user is skip or user.op == "output" or not isinstance(user.meta.get("val"), Tensor | list | tuple):
                continue
            if is_call(user, SDPA):
                args = arguments(user)
                operands = [name for name in ("query", "key", "value") if args[name] is node]
                found.attentions += [(user, name, node) for name in operands]
                found.others += [] if operands else [user]
            elif is_call(user, aten.copy.default) and user.args[0] is node:
                continue  # overwritten before it is read
            elif is_call(user, *_STEPS):
                stack.append(user)
            elif skip is not None and is_call(user, aten.cat.default) and skip in user.users:
                continue  # the lazy start of a growing cache
            else:
                found.others.append(user)
    return found


def _is_repeated(view: GraphView, node: Node, base: Node) -> bool:
    """Whether a node is `base` with each head repeated some number of times, in order."""
    if node is base:
        return True
    heads, kv_heads = shape_of(node)[1], shape_of(base)[1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int)) or heads % kv_heads:
        return False
    return view.is_layout_of(node, base, lambda x: x.repeat_interleave(heads // kv_heads, 1))


def _pair(view: GraphView, attention: Node, halves: dict[str, _Half], site_id: str) -> CacheSite | Refusal:
    """The site of an attention's two halves."""
    key, value = halves.get("key"), halves.get("value")
    if key is None or value is None:
        there, missing = ("key", "value") if key is not None else ("value", "key")
        half = halves[there]
        return view.refuse(attention, f"{there} is cached but {missing} is not", depth=7, buffer=half.write.name)
    names = {"key": key.write.name, "value": value.write.name}
    if key.write.layout != value.write.layout or key.reads != value.reads:
        return view.refuse(attention, "key and value are kept in different ways", depth=8, **names)
    if not _is_same(key.positions, value.positions):
        return view.refuse(attention, "key and value are written at different positions", depth=8, **names)
    _, kv_heads, length, head_dim = shape_of(key.buffer)
    sizes = (kv_heads, head_dim, shape_of(value.buffer)[3])
    if not all(isinstance(size, int) for size in sizes) or not same_size(kv_heads, shape_of(value.buffer)[1]):
        return view.refuse(attention, "heads of key and value differ, or are dynamic", depth=9, **names)
    static = key.write.layout == "static"
    return CacheSite(
        id=site_id,
        node=attention,
        module_path=view.module_path(attention),
        source=view.source(attention),
        key_buffer=key.buffer,
        key_name=key.write.name,
        value_buffer=value.buffer,
        value_name=value.write.name,
        key_write=key.write.node,
        value_write=value.write.node,
        new_key=key.new,
        new_value=value.new,
        positions=key.positions,
        write_dim=TOKENS,
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        value_head_dim=int(sizes[2]),
        length=int(length) if static else None,
        layout=key.write.layout,
        reads=key.reads,
    )


def _is_same(left: Any, right: Any) -> bool:
    """Whether two arguments are the same value: the same node, or the same operator on the same arguments."""
    if isinstance(left, Node) and isinstance(right, Node):
        if left is right:
            return True
        alike = left.op == right.op == "call_function" and left.target == right.target
        return alike and _is_same(left.args, right.args) and _is_same(left.kwargs, right.kwargs)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_is_same(*pair) for pair in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_is_same(left[name], right[name]) for name in left)
    return type(left) is type(right) and left == right
