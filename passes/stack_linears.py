"""Run quantized linears that read the same input as one: its tokens are quantized once, and one product is larger.

    x ── int8_linear(W1, s1) ── a                  x ── int8_linear([W1; W2], [s1; s2]) ──┬── [..., :N1] ── a
    x ── int8_linear(W2, s2) ── b      becomes                                            └── [..., N1:] ── b

Query, key and value read one activation, and so do gate and up. Only what is stacked alike in all phases is stacked,
since a weight that one phase keeps by itself would be stored twice. Exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..kernels import int4_linear, int4_weight_linear, int8_linear  # noqa: F401 (registers the operators)
from ..kernels.int4_weights import ROWS
from ..patterns.graph import GraphView
from ..patterns.nodes import arguments, aten, shape_of
from .base import Pass, PassResult
from .edit import Edit

_OPERATORS = torch.ops.graphwright
_STORED: dict[Any, dict[str, int]] = {
    _OPERATORS.int8_linear.default: {"weight": 0, "scale": 0, "bias": 0},
    _OPERATORS.int4_linear.default: {"weight": 0, "steps": 1, "scale": 0, "sums": 0, "bias": 0},
    _OPERATORS.int4_weight_linear.default: {"weight": 0, "steps": 1, "scale": 0, "bias": 0},
}
"""Operator -> its stored arguments and the dimension along which output channels lie in them."""
Stack = tuple[str, ...]
"""The weights of some linears, by their qualified names, in the order of the graph."""


@dataclass(frozen=True)
class StackLinears(Pass):
    """Join the linears of each stack.

    Attributes:
        stacks: What `common_stacks` found.
    """

    name: ClassVar[str] = "stack_linears"
    requires: ClassVar[str] = "optimized"
    ensures: ClassVar[str] = "optimized"

    stacks: tuple[Stack, ...] = ()

    def run(self, edit: Edit) -> PassResult:
        """Returns the number of calls that are gone."""
        removed = 0
        for stack, nodes in _stacks(edit.view).items():
            if stack in self.stacks:
                _join(edit, stack, nodes)
                removed += len(nodes) - 1
        return PassResult(removed)


def common_stacks(phases: Iterable[ExportedProgram]) -> tuple[Stack, ...]:
    """The stacks whose linears stand together in every phase that has one of them."""
    views = [GraphView(exported) for exported in phases]
    found = [_stacks(view) for view in views]
    held = [{view.target(node) for node in view.graph.find_nodes(op="placeholder")} for view in views]

    def is_common(stack: Stack) -> bool:
        return all(stack in stacks or names.isdisjoint(stack) for stacks, names in zip(found, held, strict=True))

    return tuple(stack for stack in dict.fromkeys(stack for stacks in found for stack in stacks) if is_common(stack))


def _stacks(view: GraphView) -> dict[Stack, list[Node]]:
    """Linears that may be joined: one operator, one input, the same options, channels in whole blocks."""
    groups: dict[Any, list[Node]] = {}
    for node in view.graph.nodes:
        if node.op != "call_function" or node.target not in _STORED:
            continue
        given = arguments(node)
        stored = _STORED[node.target]
        tensors = [given[name] for name in stored if given[name] is not None]
        alone = all(view.target(tensor) is not None and len(tensor.users) == 1 for tensor in tensors)
        whole = "steps" not in stored or shape_of(node)[-1] % ROWS == 0
        if alone and whole:
            rest = tuple((name, value) for name, value in given.items() if name not in stored)
            groups.setdefault((node.target, given["bias"] is None, _kinds(tensors, stored), rest), []).append(node)
    return {
        tuple(str(view.target(arguments(node)["weight"])) for node in nodes): nodes
        for nodes in groups.values()
        if len(nodes) > 1
    }


def _kinds(tensors: list[Node], stored: dict[str, int]) -> tuple[Any, ...]:
    """Dtype and the other dimensions of each stored tensor, which have to be alike."""
    dims = [dim for _, dim in zip(tensors, stored.values(), strict=False)]
    sizes = [(*shape_of(t)[:dim], *shape_of(t)[dim + 1 :]) for t, dim in zip(tensors, dims, strict=True)]
    return tuple((tensor.meta["val"].dtype, size) for tensor, size in zip(tensors, sizes, strict=True))


def _join(edit: Edit, stack: Stack, nodes: list[Node]) -> None:
    first, calls = nodes[0], [arguments(node) for node in nodes]
    mark = hashlib.sha256("\n".join(stack).encode()).hexdigest()[:12]

    def joined(name: str, dim: int) -> Node | None:
        if calls[0][name] is None:
            return None
        parts = [call[name] for call in calls]

        def make() -> Tensor:
            return torch.cat([edit.constant(part).detach() for part in parts], dim)

        return edit.buffer(f"{stack[0]}.stack.{mark}.{name}", make)

    dims = _STORED[first.target]
    given = {name: joined(name, dims[name]) if name in dims else value for name, value in calls[0].items()}
    y = edit.call(first.target, *given.values(), like=first)
    made_by = [node.meta.get("graphwright", {}) for node in nodes]
    y.meta["graphwright"] = {"pass": StackLinears.name, "sites": [by["site"] for by in made_by if "site" in by]}
    start = 0
    for node, by in zip(nodes, made_by, strict=True):
        width = shape_of(node)[-1]
        part = edit.call(aten.slice.Tensor, y, -1, start, start + width, like=node, before=first)
        part.meta["graphwright"] = dict(by)
        edit.replace(node, part)
        start += width
