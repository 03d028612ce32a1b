"""A program that can be trained: its graph run node by node with autograd, some linears with adapters on their weights.

    y = x (W + c B_r A_r * [W != 0])^T + b        A [R, K], B [N, R], the first r rows and columns are active

The graph is functional ATen, which autograd differentiates as it stands. Blocks of it are recomputed on the way back
(checkpointing), so memory holds the stream between blocks and one block's values. With a half type the products run in
it (autocast); adapters, streams and sums stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..errors import InvalidArgument
from ..passes.dialects import graph_arguments
from ..patterns.flow import LINEAR
from ..patterns.graph import GraphView
from ..patterns.nodes import is_call
from .layer_rates import LARGEST_RANK

SCALE = 2.0
"""c: alpha / r of the authors' code with alpha 16 and r 8; it stays when the active rank changes."""


@dataclass
class Adapter:
    """A pruned weight and the low-rank update that keeps its zeros.

    Attributes:
        weight: [N, K], pruned.
        a, b: [R, K] and [N, R], trained.
        rank: How many of R are active.
        masked: Whether the update keeps zeros; without, merging it fills them.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    rank: int
    masked: bool = True

    @classmethod
    def fresh(cls, weight: Tensor, generator: torch.Generator, masked: bool = True) -> Adapter:
        """An adapter that changes nothing yet: A as torch initialises a linear, B zero."""
        if not weight.is_floating_point() or weight.dim() != 2:
            raise InvalidArgument(
                f"got a weight {weight.dtype}{list(weight.shape)}, expected a float matrix: adapters"
                " are trained before weights are quantized"
            )
        rows, columns = weight.shape
        bound = columns**-0.5
        a = (torch.rand(LARGEST_RANK, columns, generator=generator) * 2 - 1) * bound
        return cls(weight, a.requires_grad_(), torch.zeros(rows, LARGEST_RANK).requires_grad_(), 1, masked)

    def mask(self) -> Tensor:
        """c where the update counts, 0 where it does not, [N, K] in float32."""
        kept = self.weight != 0 if self.masked else torch.ones_like(self.weight)
        return kept.float() * SCALE

    def merged(self) -> Tensor:
        """The weight with the update."""
        with torch.no_grad():
            made = (self.weight.float() + self._product() * self.mask()).to(self.weight.dtype)
            return _kept(made, self.weight) if self.masked else made

    def unmerged(self, weight: Tensor) -> Tensor:
        """The weight that becomes `weight` once this update is merged into it; its zeros stay zeros."""
        with torch.no_grad():
            held = Adapter(weight, self.a, self.b, self.rank, self.masked)
            update = held._product() * held.mask()
            made = (weight.float() - update).to(weight.dtype)
            return _kept(made, weight) if self.masked else made

    def _product(self) -> Tensor:
        return self.b[:, : self.rank] @ self.a[: self.rank]


def _kept(made: Tensor, like: Tensor) -> Tensor:
    """A weight with the zeros of another: one that its update happens to cancel would leave the mask."""
    return torch.where((like != 0) & (made == 0), torch.finfo(made.dtype).tiny, made)


class _Updated(torch.autograd.Function):
    """W + B A * mask in the type of the products, by fewer passes over [N, K] than autograd would take."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """The weight."""
        a, b, weight, mask, dtype = args
        ctx.save_for_backward(a, b, mask)
        with torch.autocast(a.device.type, enabled=False):
            return torch.addcmul(weight.float(), b @ a, mask).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of A and B."""
        a, b, mask = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            masked = grads[0] * mask
            return b.t() @ masked, masked @ a.t(), None, None, None


class TrainableProgram:
    """A program's logits and loss, differentiable with respect to adapters.

    Args:
        exported: A functional program of one user output, the logits; it is not changed.
        adapters: Linear node -> its adapter.
        cuts: Nodes between which the graph is recomputed; none to keep all values.
        dtype: What products run in.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        adapters: Mapping[Node, Adapter],
        cuts: Sequence[Node] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.exported, self.adapters, self.dtype = exported, dict(adapters), dtype
        self._masks = {node: adapter.mask() for node, adapter in adapters.items()}
        self._frozen = self._cast_weights()
        values = exported.graph.output_node().args[0]
        assert isinstance(values, list | tuple)
        specs = exported.graph_signature.output_specs
        outputs = [v for v, spec in zip(values, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
        assert isinstance(outputs[0], Node)
        self.logits_node = outputs[0]
        self._segments = _segments(exported.graph, self.logits_node, cuts)

    def logits(self, flat: Sequence[Any]) -> Tensor:
        """Logits of one call."""
        graph = self.exported.graph
        placeholders = graph.find_nodes(op="placeholder", sort=True)
        values = dict(zip(placeholders, graph_arguments(self.exported, flat), strict=True))
        with torch.autocast(self.logits_node.meta["val"].device.type, self.dtype, self.dtype != torch.float32):
            for nodes, needed, made in self._segments:
                given = [values[node] for node in needed]

                def run(*tensors: Any, nodes: Any = nodes, needed: Any = needed, made: Any = made) -> tuple[Any, ...]:
                    held = dict(zip(needed, tensors, strict=True))
                    for node in nodes:
                        held[node] = self._value(node, held)
                    return tuple(held[node] for node in made)

                if len(self._segments) > 1 and torch.is_grad_enabled():
                    results = checkpoint(run, *given, use_reentrant=False)
                else:
                    results = run(*given)
                values.update(zip(made, results, strict=True))
        return values[self.logits_node]

    def loss(self, flat: Sequence[Any]) -> Tensor:
        """Mean negative log-likelihood of the next token, nats."""
        tokens = next(value for value in flat if isinstance(value, Tensor))
        logits = self.logits(flat)[:, :-1].flatten(0, 1).float()
        return functional.cross_entropy(logits, tokens[:, 1:].flatten())

    def _cast_weights(self) -> dict[Node, Tensor]:
        """Other linears' stored weights in the type of the products, once instead of at every step."""
        view = GraphView(self.exported)
        found: dict[Node, Tensor] = {}
        for node in self.exported.graph.nodes:
            if self.dtype == torch.float32 or node in self.adapters or not is_call(node, LINEAR):
                continue
            weight = view.tensor(node.args[1])
            if weight is not None:
                found[node] = weight.detach().to(self.dtype)
        return found

    def _value(self, node: Node, held: dict[Node, Any]) -> Any:
        mapped: Any = map_arg((node.args, node.kwargs), lambda argument: held[argument])
        args, kwargs = mapped
        adapter = self.adapters.get(node)
        if adapter is not None:
            active = adapter.a[: adapter.rank], adapter.b[:, : adapter.rank]
            weight = _Updated.apply(*active, adapter.weight, self._masks[node], self.dtype)
            return functional.linear(args[0].to(self.dtype), weight, *args[2:])
        if node in self._frozen:
            return functional.linear(args[0].to(self.dtype), self._frozen[node], *args[2:])
        target: Any = node.target
        if node.op == "get_attr":
            return getattr(self.exported.graph_module, str(node.target))
        return target(*args, **kwargs)


_Segment = tuple[list[Node], list[Node], list[Node]]
"""Nodes in order, the earlier values that they need, and the values that later segments or the loss need."""


def _segments(graph: torch.fx.Graph, end: Node, cuts: Sequence[Node]) -> list[_Segment]:
    alive: set[Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node not in alive:
            alive.add(node)
            stack.extend(node.all_input_nodes)
    groups: list[list[Node]] = [[]]
    for node in graph.nodes:
        if node in alive and node.op not in ("placeholder", "output"):
            groups[-1].append(node)
            if node in cuts:
                groups.append([])
    groups = [group for group in groups if group]
    owner = {node: number for number, group in enumerate(groups) for node in group}
    segments = []
    for number, group in enumerate(groups):
        inside = set(group)
        needed = list(dict.fromkeys(a for node in group for a in node.all_input_nodes if a not in inside))
        made = [node for node in group if node is end or any(owner.get(user, number) > number for user in node.users)]
        segments.append((group, needed, made))
    return segments
