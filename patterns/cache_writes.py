"""Writes that keep a tensor from one call to the next: into a mutated buffer, or appended to an input and returned.

index_copy(buffer, 2, positions, new)      index_put(buffer, [None, None, positions], new)
slice_scatter(buffer, new, 2, start)       cat(past, new, 2)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch.export.graph_signature import OutputKind
from torch.fx import Node

from .graph import GraphView, Refusal
from .nodes import RESHAPES, arguments, aten, is_call, same_size, shape_of

Layout = Literal["static", "growing"]

TOKENS = 2
"""The dimension of tokens in [batch, kv_heads, tokens, head_dim]."""


_WRITES = frozenset({aten.index_copy.default, aten.index_put.default, aten.slice_scatter.default})


@dataclass(frozen=True)
class Write:
    """One anchored write.

    Attributes:
        node: The whole tensor after the write.
        name: Fully qualified name of the buffer; of the input that a growing cache starts from; "" for an input that is
            changed in place.
    """

    node: Node
    name: str
    layout: Layout


def cache_writes(view: GraphView) -> Iterator[Write]:
    """Every write that a cache may hang on: mutated buffers, inputs changed in place, and returned concatenations."""
    returned = {
        spec.arg.name: spec.kind
        for spec in view.exported.graph_signature.output_specs
        if spec.kind in (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION) and hasattr(spec.arg, "name")
    }
    for node in view.graph.nodes:
        if node.name in view.mutated:
            yield Write(node, view.mutated[node.name], "static")
        elif returned.get(node.name) is OutputKind.USER_INPUT_MUTATION:
            yield Write(node, "", "static")
        elif is_call(node, aten.cat.default) and node.name in returned and _past(view, node) is not None:
            past = _past(view, node)
            assert past is not None
            yield Write(node, past.name, "growing")


def what_is_written(view: GraphView, write: Write) -> tuple[Node, Node, Node | int | None] | Refusal:
    """Prove what one write does.

    Returns:
        The placeholder before the write; what is written, [batch, kv_heads, tokens, head_dim]; and its positions, as in
        `CacheSite.positions`. Or the fact that failed.
    """
    node = write.node
    if len(shape_of(node)) != 4:
        reason = "buffer is not [batch, heads, length, head_dim]"
        return view.refuse(node, reason, buffer=write.name, shape=list(shape_of(node)))
    if not write.name:
        return view.refuse(node, "buffer is an input of the call that is changed in place, not state", depth=1)
    return _appended(view, write) if write.layout == "growing" else _placed(view, write)


def _appended(view: GraphView, write: Write) -> tuple[Node, Node, None] | Refusal:
    """(past, new, None) of a concatenation."""
    args = arguments(write.node)
    parts = [part for part in args["tensors"] if not _is_empty(part)]
    if len(parts) != 2:
        return view.refuse(write.node, "more than one tensor is appended", depth=1, tensors=len(parts))
    if args["dim"] % 4 != TOKENS:
        return view.refuse(write.node, "tokens are not dimension 2", depth=2, dim=args["dim"])
    past = _past(view, write.node)
    assert past is not None
    return past, parts[1], None


def _placed(view: GraphView, write: Write) -> tuple[Node, Node, Node | int] | Refusal:
    """(buffer, new, positions) of a write into a buffer."""
    node = write.node
    if not is_call(node, *_WRITES):
        reason = "buffer is not written by token positions"
        return view.refuse(node, reason, depth=1, buffer=write.name, operator=str(node.target))
    args = arguments(node)
    buffer = args["self"]
    if is_call(buffer, *_WRITES):
        return view.refuse(node, "buffer is written twice", depth=2, buffer=write.name, first=buffer.name)
    if view.target(buffer) != write.name:
        return view.refuse(node, "write does not start from the buffer", depth=2, buffer=write.name, base=buffer.name)
    if node.target is aten.index_copy.default:
        dim, positions, new = args["dim"], args["index"], args["source"]
    elif node.target is aten.slice_scatter.default:
        dim, new = args["dim"], args["src"]
        positions = 0 if args["start"] is None else args["start"]
        if args["step"] != 1:
            return view.refuse(node, "index is not provable", depth=3, buffer=write.name, step=args["step"])
    else:
        indexed = [(dim, index) for dim, index in enumerate(args["indices"]) if index is not None]
        if len(indexed) != 1 or len(shape_of(indexed[0][1])) != 1 or args["accumulate"]:
            ranks = [len(shape_of(index)) for _, index in indexed]
            reason = "index is not provable"
            return view.refuse(
                node, reason, depth=3, buffer=write.name, index_ranks=ranks, accumulate=args["accumulate"]
            )
        (dim, positions), new = indexed[0], args["values"]
    if dim % 4 != TOKENS:
        return view.refuse(node, "tokens are not dimension 2", depth=3, buffer=write.name, dim=dim)
    full = _as_written(new, node, positions)
    if full is None:
        reason = "what is written is not [batch, heads, tokens, head_dim]"
        return view.refuse(node, reason, depth=3, buffer=write.name, shape=list(shape_of(new)))
    return buffer, full, positions


def _as_written(new: Node, write: Node, positions: Node | int) -> Node | None:
    """The written tensor in its full four dimensions: before a copy into a slice or a reshape."""
    sizes = shape_of(write)
    while True:
        shape = shape_of(new)
        fits = len(shape) == 4 and all(same_size(shape[dim], sizes[dim]) for dim in (0, 1, 3))
        if is_call(new, aten.copy.default):
            source = new.args[1]
        elif fits:
            tokens = shape_of(positions) if isinstance(positions, Node) else ()
            return new if not tokens or same_size(tokens[0], shape[TOKENS]) else None
        elif is_call(new, *RESHAPES):
            source = new.args[0]
        else:
            return None
        assert isinstance(source, Node)
        new = source


def _past(view: GraphView, cat: Node) -> Node | None:
    """The input that a concatenation appends to; empty constants before it (transformers' lazy start) do not count."""
    parts = [part for part in arguments(cat)["tensors"] if not _is_empty(part)]
    if not parts:
        return None
    first = parts[0]
    if is_call(first, aten.cat.default) and len([p for p in arguments(first)["tensors"] if not _is_empty(p)]) == 1:
        return _past(view, first)
    return first if view.is_user_input(first) else None


def _is_empty(node: Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in shape_of(node))
