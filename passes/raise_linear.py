"""Raise decomposed linears to one `aten.linear`.

    x ── view ── mm(permute(W)) ── view ── y            becomes     x ── linear(W) ── y
    x ── view ── addmm(b, ·, permute(W)) ── view ── y   becomes     x ── linear(W, b) ── y

Programs that went through the default decompositions hold the left side. Exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ..patterns.graph import RESHAPES, aten, is_call, same_shape, shape_of
from .base import Pass, PassResult
from .edit import Edit

_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)


@dataclass(frozen=True)
class RaiseLinear(Pass):
    """One linear where a matrix product with a transposed weight stood."""

    name: ClassVar[str] = "raise_linear"
    after: ClassVar[tuple[str, ...]] = ("drop_noops",)
    requires: ClassVar[str] = "exported"
    ensures: ClassVar[str] = "exported"

    def run(self, edit: Edit) -> PassResult:
        """Rewrite every matching product."""
        changed = 0
        for node in list(edit.graph.nodes):
            if is_call(node, aten.mm.default):
                (rows, transposed), bias = node.args, None
            elif is_call(node, aten.addmm.default) and not node.kwargs:
                bias, rows, transposed = node.args
            else:
                continue
            weight = _transposed_weight(edit, transposed)
            if weight is None or (bias is not None and not (isinstance(bias, Node) and len(shape_of(bias)) == 1)):
                continue
            assert isinstance(rows, Node)
            changed += 1
            source, output = _unflattened(rows, node)
            linear = edit.call(aten.linear.default, source, weight, *([bias] if bias is not None else []), like=node)
            edit.replace(output, linear)
        return PassResult(changed)


def _transposed_weight(edit: Edit, node: object) -> Node | None:
    if not is_call(node, *_TRANSPOSES):
        return None
    assert isinstance(node, Node)
    swaps = node.target is aten.t.default or sorted(arg % 2 for arg in _dims(node)) == [0, 1]
    weight = node.args[0]
    if swaps and isinstance(weight, Node) and len(shape_of(weight)) == 2 and edit.view.is_weight(weight):
        return weight if _dims(node) != [0, 1] or node.target is not aten.permute.default else None
    return None


def _dims(node: Node) -> list[int]:
    dims = node.args[1] if node.target is aten.permute.default else node.args[1:]
    return [int(dim) for dim in dims]  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType, reportOptionalIterable]


def _unflattened(rows: Node, product: Node) -> tuple[Node, Node]:
    """Input and output before and after the batch was folded into rows, where it was; else the product's own."""
    users = list(product.users)
    if not (is_call(rows, *RESHAPES) and len(users) == 1 and is_call(users[0], *RESHAPES)):
        return rows, product
    source, output = rows.args[0], users[0]
    assert isinstance(source, Node)
    before, after = shape_of(source), shape_of(output)
    features = same_shape(before[:-1], after[:-1]) and same_shape(before[-1:], shape_of(rows)[-1:])
    return (source, output) if features and same_shape(after[-1:], shape_of(product)[-1:]) else (rows, product)
