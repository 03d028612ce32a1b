"""The residual stream: the tensor that blocks read through norms and add to, and whether it may be rotated.

    h = embedding(tokens);   h = h + o(attention(norm(h)));   h = h + down(mlp(norm(h)));   head(norm(h))

Writers add to it (embeddings, and linears such as o and down), norms read it for the linears behind them. If nothing
else touches it, an orthogonal R may be folded into the weights: writers write h R, a norm without gain gives norm(h) R,
and its readers multiply by R^T first. What makes that illegal is refused by name.

LayerNorm subtracts the mean. Where every writer's output is made mean-free, which is exact since nothing but such norms
reads the stream, LayerNorm is an RMSNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import Node

from .flow import LINEAR
from .graph import GraphView, Refusal, scalar_of
from .nodes import CASTS, RESHAPES, arguments, aten, is_call, is_size, shape_of
from .norm import LAYER_NORM, RMS_NORM
from .site import Found, Ordinals, Site

EMBEDDING = aten.embedding.default


@dataclass(frozen=True)
class ResidualStream(Site):
    """One residual stream that may be rotated; its node is the last sum.

    Attributes:
        width: Channels of the stream.
        form: What reads it: "rms_norm", or "layer_norm" where any norm subtracts the mean.
        embeddings: `aten.embedding` calls that write to it.
        writers: Linears that write to it.
        norms: Norms that read it, each with the linears that read the norm.
    """

    kind: ClassVar[str] = "residual"

    width: int
    form: Literal["rms_norm", "layer_norm"]
    embeddings: tuple[Node, ...]
    writers: tuple[Node, ...]
    norms: tuple[tuple[Node, tuple[Node, ...]], ...]

    @property
    def readers(self) -> tuple[Node, ...]:
        """The linears that read the stream, in graph order within each norm."""
        return tuple(linear for _, linears in self.norms for linear in linears)

    def describe(self) -> dict[str, str]:
        """Facts for tables."""
        return {
            "role": "stream",
            "width": str(self.width),
            "form": self.form,
            "writers": f"{len(self.embeddings)} embeddings, {len(self.writers)} linears",
            "readers": f"{len(self.norms)} norms, {len(self.readers)} linears",
        }


def find_streams(view: GraphView, phase: str = "main") -> Found[ResidualStream]:
    """Find every residual stream of a functional program: what a sum that a norm reads is connected to.

    Refused, with the fact: a stored tensor that is added (a learned position that is no embedding), a scale per
    channel, a norm that writes (post-norm), any writer that is no linear with a stored weight, and any reader but a
    norm whose output goes to such linears alone.
    """
    alive = live_nodes(view)
    sites: list[ResidualStream] = []
    refusals: list[Refusal] = []
    ordinals = Ordinals(phase)
    seen: set[Node] = set()
    for node in view.graph.nodes:
        # Anchored on norms: a norm of something that is never added to is not of a residual stream.
        if node not in alive or not is_call(node, RMS_NORM, LAYER_NORM) or node.args[0] in seen:
            continue
        start = node.args[0]
        assert isinstance(start, Node)
        stream = _Stream(view, alive, start)
        seen |= stream.members
        sums = [member for member in view.graph.nodes if member in stream.members and is_call(member, aten.add.Tensor)]
        if not sums:
            continue
        site_id = ordinals.next_id("", ResidualStream.kind)
        if stream.refusal is not None:
            refusals.append(stream.refusal)
            continue
        sites.append(
            ResidualStream(
                id=site_id,
                node=sums[-1],
                module_path="",
                source=view.source(sums[-1]),
                width=stream.width,
                form="layer_norm" if any(is_call(n, LAYER_NORM) for n in stream.norms) else "rms_norm",
                embeddings=_ordered(view, stream.embeddings),
                writers=_ordered(view, stream.writers),
                norms=tuple((norm, _ordered(view, stream.norms[norm])) for norm in _ordered(view, stream.norms)),
            )
        )
    return Found(tuple(sites), tuple(refusals))


def live_nodes(view: GraphView) -> set[Node]:
    """The nodes that an output depends on; an edit that is not finished leaves others behind."""
    alive: set[Node] = set()
    stack = [view.graph.output_node()]
    while stack:
        node = stack.pop()
        if node not in alive:
            alive.add(node)
            stack.extend(node.all_input_nodes)
    return alive


class _Stream:
    """Walks over sums, row views, casts and scalar factors, both ways, and sorts what it ends at."""

    def __init__(self, view: GraphView, alive: set[Node], start: Node) -> None:
        self.view, self.alive = view, alive
        self.members: set[Node] = set()
        self.embeddings: dict[Node, None] = {}
        self.writers: dict[Node, None] = {}
        self.norms: dict[Node, dict[Node, None]] = {}
        self.refusal: Refusal | None = None
        size = shape_of(start)[-1] if shape_of(start) else 0
        self.width = size if isinstance(size, int) else 0
        stack = [start]
        while stack:
            node = stack.pop()
            if node in self.members:
                continue
            if not self._is_inside(node):
                self._end(node)
                continue
            self.members.add(node)
            stack.extend(self._sources(node))
            stack.extend(user for user in node.users if user in alive and self._is_inside(user))
        # What reads: members and, since their output is the stream's first value, embeddings and linears that write.
        for node in (*self.members, *self.embeddings, *self.writers):
            for user in node.users:
                if user in alive and user not in self.members:
                    self._read(node, user)

    def _is_inside(self, node: Node) -> bool:
        """Whether a node only passes the stream on: a sum of two streams, rows picked or reshaped, one factor."""
        if is_call(node, aten.add.Tensor):
            return all(isinstance(a, Node) for a in node.args[:2]) and not node.kwargs and self._is_wide(node)
        if is_call(node, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
            return self._is_wide(node) and scalar_of(self.view, node.args[1]) is not None
        return keeps_rows(node) and self._is_wide(node)

    def _is_wide(self, node: Node) -> bool:
        shape = shape_of(node)
        return bool(shape) and isinstance(shape[-1], int) and shape[-1] == self.width

    def _sources(self, node: Node) -> list[Node]:
        count = 2 if is_call(node, aten.add.Tensor) else 1
        return [argument for argument in node.args[:count] if isinstance(argument, Node)]

    def _end(self, node: Node) -> None:
        """Sort what writes to the stream."""
        if is_call(node, EMBEDDING):
            table = node.args[0]
            assert isinstance(table, Node)
            if not self.view.is_weight(table):
                self._refuse(node, "an embedding's table is computed")
            self.embeddings[node] = None
        elif is_call(node, LINEAR):
            weight = node.args[1]
            assert isinstance(weight, Node)
            if not self.view.is_weight(weight):
                self._refuse(node, "a linear that writes to the stream has a computed weight")
            self.writers[node] = None
        elif node.op == "placeholder" and self.view.is_weight(node):
            self._refuse(node, "a stored tensor is added to the stream", tensor=self.view.target(node))
        elif is_call(node, RMS_NORM, LAYER_NORM):
            self._refuse(node, "a norm writes to the stream, and its gain is per channel", operator=str(node.target))
        elif is_call(node, aten.mul.Tensor, aten.div.Tensor):
            self._refuse(node, "the stream is scaled per channel or gated")
        else:
            what = str(node.target) if node.op == "call_function" else f"input {node.name}"
            self._refuse(node, "the stream is written by something that is no linear", operator=what)

    def _read(self, node: Node, user: Node) -> None:
        """Sort what reads the stream."""
        if is_size_query(user) or (is_call(user, aten.add.Tensor) and user in self.members):
            return
        if user.op == "output":
            self._refuse(node, "the stream itself is an output")
        elif is_call(user, RMS_NORM, LAYER_NORM) and user.args[0] is node:
            self._norm(user)
        else:
            self._refuse(user, "the stream is read by something that is no norm", operator=str(user.target))

    def _norm(self, norm: Node) -> None:
        args = arguments(norm)
        sizes = list(args["normalized_shape"])
        if sizes != [self.width]:
            self._refuse(norm, "a norm does not normalise over the stream's channels", normalized_shape=sizes)
        for name in ("weight", "bias"):
            value = args.get(name)
            if value is not None and not self.view.is_weight(value):
                self._refuse(norm, f"a norm's {name} is computed")
        linears: dict[Node, None] = {}
        stack = [norm]
        while stack:
            node = stack.pop()
            for user in node.users:
                if user not in self.alive or is_size_query(user):
                    continue
                if is_call(user, LINEAR) and user.args[0] is node:
                    weight = user.args[1]
                    assert isinstance(weight, Node)
                    if not self.view.is_weight(weight):
                        self._refuse(user, "a linear that reads the stream has a computed weight")
                    linears[user] = None
                elif keeps_rows(user) and self._is_wide(user):
                    stack.append(user)
                elif user.op == "output":
                    self._refuse(norm, "a norm of the stream is an output")
                else:
                    self._refuse(user, "a norm is read by something that is no linear", operator=str(user.target))
        self.norms[norm] = linears

    def _refuse(self, node: Node, reason: str, **facts: object) -> None:
        if self.refusal is None:
            self.refusal = self.view.refuse(node, reason, depth=len(self.members), width=self.width, **facts)


def keeps_rows(node: Node) -> bool:
    """Whether every row (last dimension) of a node is a row of its principal input, unchanged; the caller compares
    the widths of reshapes."""
    if is_call(node, *CASTS, aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default):
        return True
    if is_call(node, *RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default):
        return True
    if is_call(node, aten.slice.Tensor, aten.select.int, aten.index_select.default):
        source = node.args[0]
        assert isinstance(source, Node)
        rank = len(shape_of(source))
        dim = arguments(node)["dim"]
        return dim % rank != rank - 1
    if is_call(node, aten.transpose.int):
        rank = len(shape_of(node))
        return all(dim % rank != rank - 1 for dim in node.args[1:3])  # pyright: ignore[reportOperatorIssue]
    return False


def is_size_query(node: Node) -> bool:
    """Whether a node asks for sizes only."""
    return node.op == "call_function" and is_size(node)


def _ordered(view: GraphView, nodes: dict[Node, None] | dict[Node, dict[Node, None]]) -> tuple[Node, ...]:
    return tuple(node for node in view.graph.nodes if node in nodes)
