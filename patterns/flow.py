"""Where values come from, with layout and elementwise arithmetic seen through.

A tensor's *flow* is the set of sources that its values are made of, with nothing in between but layout, elementwise
arithmetic, norms and cache writes. Sources are matrix products, attentions, inputs, and everything else that mixes. A
residual addition ends a flow: where two different sources are added, the sum is a new source.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..torch_private import OpOverload
from .attention_forms import SDPA, SOFTMAX
from .graph import GraphView
from .nodes import CASTS, VIEWS, aten, is_call, same_shape, shape_of

LINEAR = aten.linear.default

ACTIVATIONS = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.relu6.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.erf.default,
        aten.elu.default,
        aten.mish.default,
        aten.softplus.default,
        aten.leaky_relu.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.hardtanh.default,
        aten.clamp_min.default,
    }
)
"""Nonlinear elementwise functions of one tensor, and the parts that such functions are spelled out with."""

MATRIX_PRODUCTS = frozenset(
    {
        LINEAR,
        SDPA,
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
        aten.convolution.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
    }
)
"""Operators that sum products over features or positions."""


class Origin(NamedTuple):
    """A source of values, and which piece of it where it was split or sliced on the way."""

    root: Node
    piece: str = ""


@dataclass(frozen=True)
class Trace:
    """How values came from an origin: through an activation, and multiplied by which other origins."""

    activated: bool = False
    factors: frozenset[Origin] = frozenset()


Flow = Mapping[Origin, Trace]


class Flows:
    """The flow of every node of a functional program; a constant's is empty.

    One walk in graph order, which is topological, so the cost is linear in the graph.

    Attributes:
        attentions: Output node of each attention -> its (query, key, value) operands. Covers SDPA and a softmax between
            two matrix products, whatever is done to the scores before it.
    """

    def __init__(self, view: GraphView) -> None:
        self.attentions: dict[Node, tuple[Node, Node, Node]] = {}
        self._view = view
        self._flows: dict[Node, Flow] = {}
        for node in view.graph.nodes:
            flow = self._flow(node)
            if flow is None or len(flow) > _MOST_ORIGINS:
                flow = {Origin(node): Trace()}
            self._flows[node] = flow
            if node.target in MATRIX_PRODUCTS:
                self._note_attention(node)

    def __getitem__(self, node: Node) -> Flow:
        return self._flows[node]

    def _flow(self, node: Node) -> Flow | None:
        """The flow of a node from those of its inputs, None where the node is a new source."""
        if node.op == "placeholder":
            return _CONSTANT if self._view.is_weight(node) else None
        if node.op != "call_function" or node.target in _SHAPE_ONLY:
            return _CONSTANT
        if not isinstance(node.meta.get("val"), Tensor | list | tuple):
            return _CONSTANT  # sizes and asserts
        inputs = [self._flows[parent] for parent in node.all_input_nodes]
        if not any(inputs):
            return _CONSTANT
        target: Any = node.target
        if target in MATRIX_PRODUCTS:
            return None
        first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if target is aten.copy.default:
            source = node.args[1]
            return self._flows[source] if isinstance(source, Node) else _CONSTANT
        if first is not None and (target is operator.getitem or target in _PIECES):
            return self._piece(node, first)
        if first is not None and (target in _FIRST or str(target) in _ROTATIONS):
            return self._flows[first]
        if target in _THROUGH:
            return _merged(inputs)
        if target in _ADDITIONS:
            return self._sum(inputs)
        if target in ACTIVATIONS:
            return _mapped(_product(inputs), lambda trace: Trace(True, trace.factors))
        if isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags:
            return _product(inputs)
        return None

    def _piece(self, node: Node, whole: Node) -> Flow:
        """A slice or one part of a split, named by what it takes, so that the same piece taken twice is one."""
        if node.target is not operator.getitem and same_shape(shape_of(node), shape_of(whole)):
            return self._flows[whole]
        split = whole.args[1:] if node.target is operator.getitem else ()
        piece = f"{node.target}{node.args[1:]}{split}"
        return {Origin(origin.root, origin.piece + piece): trace for origin, trace in self._flows[whole].items()}

    def _sum(self, flows: list[Flow]) -> Flow | None:
        """Constants, two halves of one thing (RoPE) and attentions may be added; any other sum is a residual."""
        flows = [flow for flow in flows if flow]
        if len(flows) == 1:
            return flows[0]
        roots = [
            {origin.root for origin in flow if is_call(origin.root, LINEAR) or origin.root in self.attentions}
            for flow in flows
        ]
        alike = all(group == roots[0] for group in roots)
        attentions = all(root in self.attentions for group in roots for root in group)
        return _merged(flows) if all(roots) and (alike or attentions) else None

    def _note_attention(self, node: Node) -> None:
        operands = [argument for argument in node.args if isinstance(argument, Node)]
        if node.target is SDPA:
            self.attentions[node] = (operands[0], operands[1], operands[2])
        elif is_call(node, aten.matmul.default, aten.bmm.default):
            probabilities, value = operands
            for softmax in self._roots(probabilities, SOFTMAX):
                for scores in self._roots(_first(softmax), _SCORES):
                    query, key = scores.args[-2:]
                    if isinstance(query, Node) and isinstance(key, Node):
                        self.attentions[node] = (query, key, value)

    def _roots(self, node: Node, targets: frozenset[Any]) -> list[Node]:
        return [origin.root for origin in self._flows[node] if is_call(origin.root, *targets)]


_CONSTANT: Flow = {}
# A tensor made of more sources than this is a source of its own; keeps the walk linear on any graph.
_MOST_ORIGINS = 64

_SCORES = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default})
_ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_PIECES = frozenset({aten.slice.Tensor, aten.select.int, aten.narrow.default})
# Only the first argument's values pass: what comes after are gains, shapes and positions.
_ROTATIONS = frozenset({"graphwright.hadamard.default"})
"""Rotations of features, by name: patterns know no operators of ours. Values pass through these as through norms."""
_FIRST = frozenset(
    {
        aten.layer_norm.default,
        aten.native_layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.dropout.default,
        aten.type_as.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.gather.default,
        aten.constant_pad_nd.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
    }
)
# All tensor arguments' values pass, side by side or combined over tokens and features.
_THROUGH = (VIEWS | CASTS) | frozenset(
    {
        aten.cat.default,
        aten.stack.default,
        aten.index_copy.default,
        aten.index_put.default,
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.view_as_complex.default,
        aten.view_as_real.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.roll.default,
        aten.flip.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.var.correction,
        aten.linalg_vector_norm.default,
    }
)
_SHAPE_ONLY = frozenset(
    {
        aten.empty_like.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_empty.default,
        aten.new_full.default,
    }
)


def _merged(flows: Iterable[Flow]) -> Flow:
    """Several flows side by side; what is activated on one way counts as activated, so `x * sigmoid(x)` is one."""
    result: dict[Origin, Trace] = {}
    for flow in flows:
        for origin, trace in flow.items():
            old = result.get(origin, Trace())
            result[origin] = Trace(old.activated or trace.activated, old.factors | trace.factors)
    return result


def _product(flows: list[Flow]) -> Flow:
    """Several flows multiplied (or combined elementwise in any other way): each notes the origins of the others."""
    origins = [frozenset(flow) for flow in flows]
    noted = []
    for position, flow in enumerate(flows):
        others = frozenset().union(*origins[:position], *origins[position + 1 :]) - origins[position]
        noted.append(_mapped(flow, lambda trace, others=others: Trace(trace.activated, trace.factors | others)))
    return _merged(noted)


def _mapped(flow: Flow, change: Callable[[Trace], Trace]) -> Flow:
    return {origin: change(trace) for origin, trace in flow.items()}


def _first(node: Node) -> Node:
    argument = node.args[0]
    assert isinstance(argument, Node)
    return argument
