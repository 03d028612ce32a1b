"""Prune a program's linears layer by layer, each on what the pruned layers before it give, and see what that does.

One walk over the program computes, for all texts at once (`walk.py`): each layer's input, for the similarity of layers;
each linear's mask or pruned weight, from its inputs; each layer's output, for its error against the dense program's.

    e_l = mean over channels c of ||D_c - S_c||^2 / ||D_c||^2        D, S: the layer's output before and after
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn import functional

from ..errors import InvalidArgument
from ..patterns.graph import GraphView
from ..patterns.linear import LinearSite
from ..patterns.nodes import aten, describe, is_call
from ..patterns.norm import LAYER_NORM, RMS_NORM
from ..patterns.residual import keeps_rows
from .cka import cka, gram, redundancy
from .sparsegpt import sparsegpt
from .walk import Handler, walk
from .wanda import wanda_mask

Weights = dict[str, Tensor]
"""Place of a linear -> its weight."""


class Layer(NamedTuple):
    """One block: a run of linears that ends with a down projection.

    Attributes:
        sites: Its linears.
        input: The stream that it reads.
        output: The stream with what it adds.
    """

    sites: tuple[LinearSite, ...]
    input: Node
    output: Node


@dataclass(frozen=True)
class Pruner:
    """How weights are pruned.

    Attributes:
        kind: "wanda" or "sparsegpt".
        pattern: n of every m stay; None is unstructured.
    """

    kind: str
    pattern: tuple[int, int] | None = None

    def prune(self, weight: Tensor, rows: Sequence[Tensor], sparsity: float, pattern: Any) -> Tensor:
        """A pruned weight, from the inputs [.., K] that it sees."""
        tokens = [row.reshape(-1, weight.shape[1]).float() for row in rows]
        if self.kind == "sparsegpt":
            hessian = torch.zeros(weight.shape[1], weight.shape[1])
            for part in tokens:
                hessian.addmm_(part.t(), part)
            return sparsegpt(weight, hessian, sparsity, pattern)
        squares = torch.stack([part.square().sum(0) for part in tokens]).sum(0)
        return torch.where(wanda_mask(weight, squares, sparsity, pattern), weight, 0.0)


def find_layers(view: GraphView, sites: Sequence[LinearSite]) -> list[Layer]:
    """The blocks of a decoder or an encoder, by dataflow.

    Raises:
        InvalidArgument: Linears do not form blocks with a residual stream: the first of a block reads no norm, or what
            the last one gives is not added to the stream.
    """
    layers: list[Layer] = []
    group: list[LinearSite] = []
    for site in sites:
        if site.role == "head":
            continue
        group.append(site)
        if site.role == "down":
            layers.append(Layer(tuple(group), _read(view, group[0]), _added(group[-1])))
            group = []
    if not layers:
        raise InvalidArgument("losa prunes layer by layer, and no linear of this program ends one (role down)")
    return layers


def layer_redundancy(
    exported: ExportedProgram, inputs: Sequence[list[Any]], layers: Sequence[Layer], weights: Weights | None = None
) -> list[float]:
    """How much each layer's input is like the others', from texts of one length; shares that sum to 1.

    Each token counts alike: its row is scaled to one root mean square, as the norm that reads it scales it. Without
    that the first token's few huge values are all that is compared: of SmolLM2's layers, the last came out most alike.
    """
    grams: dict[Node, Tensor] = {}

    def see(node: Node, values: list[Tensor]) -> None:
        rows = [value.float() for value in values]
        grams[node] = gram([row * row.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt() for row in rows])

    handlers = {layer.input: _watch(layer.input, see) for layer in layers}
    walk(exported, inputs, handlers | _replaced(layers, weights))
    return redundancy(cka([grams[layer.input] for layer in layers])).tolist()


def layer_outputs(
    exported: ExportedProgram, inputs: Sequence[list[Any]], layers: Sequence[Layer], weights: Weights | None = None
) -> dict[Node, list[Tensor]]:
    """What each layer gives for each text, in bfloat16."""
    found: dict[Node, list[Tensor]] = {}

    def keep(node: Node, values: list[Tensor]) -> None:
        found[node] = [value.to(torch.bfloat16) for value in values]

    handlers = {layer.output: _watch(layer.output, keep) for layer in layers}
    walk(exported, inputs, handlers | _replaced(layers, weights))
    return found


def prune_layers(
    exported: ExportedProgram,
    inputs: Sequence[list[Any]],
    layers: Sequence[Layer],
    weights: Weights,
    pruner: Pruner,
    rates: Sequence[float],
    pattern: tuple[int, int] | None,
    dense: Mapping[Node, Sequence[Tensor]],
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Weights, list[float]]:
    """Prune every layer in order.

    Args:
        exported: The program; it is not changed.
        inputs: Flat inputs.
        layers: Its blocks.
        weights: The weights to prune, which take the place of the program's own; linears without stay as they are.
        pruner: How.
        rates: Sparsity of each layer.
        pattern: n of every m stay instead.
        dense: What each layer gave before anything was pruned.
        on_step: Called after each linear.

    Returns:
        The pruned weights, and the error of each layer's output.
    """
    pruned: Weights = {}
    errors: dict[Node, float] = {}

    def linear(site: LinearSite, rate: float) -> Handler:
        def run(calls: list[tuple[Any, ...]]) -> list[Tensor]:
            weight = pruner.prune(weights[site.place], [call[0] for call in calls], rate, pattern)
            pruned[site.place] = weight
            on_step()
            return [functional.linear(call[0], weight, *call[2:]) for call in calls]

        return run

    handlers: dict[Node, Handler] = {}
    for layer, rate in zip(layers, rates, strict=True):
        handlers |= {site.node: linear(site, rate) for site in layer.sites if site.place in weights}
        known = dense[layer.output]
        handlers[layer.output] = _watch(
            layer.output, lambda node, values, known=known: errors.__setitem__(node, _relative(known, values))
        )
    walk(exported, inputs, handlers)
    return pruned, [errors[layer.output] for layer in layers]


def _relative(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    off = length = torch.zeros(())
    for before, after in zip(dense, pruned, strict=True):
        before = before.float().flatten(0, -2)
        off = off + (before - after.float().flatten(0, -2)).square().sum(0)
        length = length + before.square().sum(0)
    return float((off / length.clamp_min(1e-30)).mean())


def _watch(node: Node, see: Callable[[Node, list[Tensor]], None]) -> Handler:
    def run(calls: list[tuple[Any, ...]]) -> list[Any]:
        target: Any = node.target
        values = [target(*call, **node.kwargs) for call in calls]
        see(node, values)
        return values

    return run


def _replaced(layers: Sequence[Layer], weights: Weights | None) -> dict[Node, Handler]:
    """Linears with other weights than the program's."""

    def linear(weight: Tensor) -> Handler:
        return lambda calls: [functional.linear(call[0], weight, *call[2:]) for call in calls]

    known = weights or {}
    return {s.node: linear(known[s.place]) for layer in layers for s in layer.sites if s.place in known}


def _read(view: GraphView, site: LinearSite) -> Node:
    node = site.input
    while keeps_rows(node):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
        assert isinstance(node, Node)
    if not is_call(node, RMS_NORM, LAYER_NORM):
        raise InvalidArgument(f"losa: {site.place} reads {describe(node)}, expected a norm of a residual stream")
    source = node.args[0]
    assert isinstance(source, Node)
    if source.op == "placeholder":
        raise InvalidArgument(f"losa: {site.place} reads an input of the call, expected a residual stream")
    return source


def _added(site: LinearSite) -> Node:
    node = site.node
    while True:
        (*_, last) = [user for user in node.users if user.op != "output"] or [None]
        if last is not None and is_call(last, aten.add.Tensor):
            return last
        if last is None or not keeps_rows(last):
            raise InvalidArgument(f"losa: what {site.place} gives is not added to a residual stream")
        node = last
