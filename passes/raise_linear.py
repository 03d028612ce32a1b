"""Raise decomposed linears to one `aten.linear`.

    x ── view ── mm(permute(W)) ── view ── y            becomes     x ── linear(W) ── y
    x ── view ── addmm(b, ·, permute(W)) ── view ── y   becomes     x ── linear(W, b) ── y
    x ── bmm(expand(permute(W))) ── add(b) ── y         becomes     x ── linear(W, b) ── y

Programs that went through the default decompositions hold the left side. Exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ..patterns.nodes import RESHAPES, aten, is_call, same_shape, shape_of
from .base import Pass, PassResult
from .edit import Edit


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
                found = _rows(edit, node, *node.args)
            elif is_call(node, aten.addmm.default) and not node.kwargs:
                found = _rows(edit, node, node.args[1], node.args[2], node.args[0])
            elif is_call(node, aten.bmm.default):
                found = _batched(edit, node)
            else:
                continue
            changed += found
        return PassResult(changed)


def _rows(edit: Edit, product: Node, rows: object, transposed: object, bias: object = None) -> bool:
    """Rewrite a 2-D product; the linear is put before the fold into rows, where there is one."""
    weight = _transposed_weight(edit, transposed)
    if weight is None or not isinstance(rows, Node) or not (bias is None or _is_vector(bias)):
        return False
    source = rows.args[0] if is_call(rows, *RESHAPES) else rows
    assert isinstance(source, Node)
    if not same_shape(shape_of(source)[-1:], shape_of(rows)[-1:]):
        source = rows
    linear = edit.call(aten.linear.default, source, weight, *([] if bias is None else [bias]), like=product)
    if source is not rows:
        for user in list(product.users):
            if user.target in RESHAPES and len(user.args) == 2:
                same = same_shape(shape_of(user), shape_of(linear))
                shaped = linear if same else edit.call(aten.reshape.default, linear, user.args[1], like=user)
                edit.replace(user, shaped)
        linear = edit.call(aten.reshape.default, linear, [-1, shape_of(product)[-1]], like=product)
    edit.replace(product, linear)
    return True


def _batched(edit: Edit, product: Node) -> bool:
    """Rewrite a batched product with one weight for the whole batch, and the bias that is added after it."""
    source, expanded = product.args[:2]
    if not is_call(expanded, aten.expand.default):
        return False
    assert isinstance(expanded, Node)
    weight = _transposed_weight(edit, expanded.args[0])
    if weight is None:
        return False
    bias, output = None, product
    users = list(product.users)
    if len(users) == 1 and is_call(users[0], aten.add.Tensor) and not users[0].kwargs:
        other = users[0].args[1] if users[0].args[0] is product else users[0].args[0]
        if _is_vector(other) and same_shape(shape_of(other), shape_of(product)[-1:]):  # pyright: ignore[reportArgumentType]
            bias, output = other, users[0]
    linear = edit.call(aten.linear.default, source, weight, *([] if bias is None else [bias]), like=output)
    edit.replace(output, linear)
    return True


def _is_vector(node: object) -> bool:
    return isinstance(node, Node) and len(shape_of(node)) == 1


def _transposed_weight(edit: Edit, node: object) -> Node | None:
    """The weight [N, K] whose transpose a node is."""
    if not is_call(node, aten.t.default, aten.permute.default, aten.transpose.int):
        return None
    assert isinstance(node, Node)
    weight = node.args[0]
    if not isinstance(weight, Node) or len(shape_of(weight)) != 2 or not edit.view.is_weight(weight):
        return None
    if node.target is aten.permute.default:
        return weight if [dim % 2 for dim in node.args[1]] == [1, 0] else None  # pyright: ignore[reportGeneralTypeIssues, reportOperatorIssue, reportOptionalIterable]
    if node.target is aten.transpose.int:
        return weight if node.args[1] % 2 != node.args[2] % 2 else None  # pyright: ignore[reportOperatorIssue]
    return weight
