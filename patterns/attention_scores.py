"""The scores of an eager attention: from the softmax back over mask, offset and factors to the product of the two.

    softmax(offset + scale * query @ key^T + mask)      softmax(where(keep, offset + scale * query @ key^T, fill))

Terms may come in any order that leaves one mask, one offset and one factor; anything else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .graph import GraphView, Refusal, scalar_of
from .nodes import CASTS, VIEWS, arguments, aten, first_tensor, is_call

PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default})
_MULTIPLY = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIVIDE = frozenset({aten.div.Tensor, aten.div.Scalar})
_LOWEST = -1e4  # a term below this, added before softmax, removes a key in every float dtype (fp16 ends at -65504)


@dataclass(frozen=True)
class MaskTerm:
    """What limits a score: a bool mask (True keeps), an inverted one (True drops), or an additive float term."""

    node: Node
    inverted: bool = False
    fill: float | None = None
    """For bool masks: what a dropped score is replaced by."""


@dataclass(frozen=True)
class Offset:
    """A float term that is added to the scores: [batch, heads, queries, keys], or what broadcasts to it.

    Attributes:
        node: The tensor.
        heads: Where batch and heads are one dimension of it, its first, the number of heads.
    """

    node: Node
    heads: int | None = None


def walk_to_product(
    view: GraphView, node: Any, anchor: Node
) -> tuple[Node, MaskTerm | None, float, Node | None] | Refusal:
    """Walk back from the softmax's input to the product of query and key: (product, mask, scale, offset)."""
    mask: MaskTerm | None = None
    scale = 1.0
    for _ in range(24):
        if not isinstance(node, Node):
            break
        if is_call(node, *PRODUCTS):
            offset = None
            if node.target is aten.baddbmm.default:
                factors = arguments(node)
                if factors["beta"] != 0:
                    if factors["beta"] != 1 or scale != 1.0:
                        factor = scale * float(factors["beta"])
                        return view.refuse(node, "the offset of the scores has a factor", depth=2, factor=factor)
                    offset = factors["self"]
                scale *= float(factors["alpha"])
            return node, mask, scale, offset
        if is_call(node, *CASTS, *VIEWS):
            node = node.args[0]
            continue
        factor = scalar_factor(view, node)
        if factor is not None:
            node, value = factor
            scale *= value
            continue
        term = _mask_term(view, node)
        if term is None:
            return view.refuse(
                node, "scores are not a scaled, masked matrix product", depth=1, operator=str(node.target)
            )
        if mask is not None:
            return view.refuse(node, "scores are masked twice", depth=2, operator=str(node.target))
        if scale != 1.0:
            return view.refuse(node, "scores are scaled after the mask", depth=2, scale=scale)
        node, mask = term
    return view.refuse(anchor, "no matrix product before the softmax", depth=1)


def _mask_term(view: GraphView, node: Node) -> tuple[Node, MaskTerm] | None:
    """Split a masking step into the scores before it and the mask."""
    if is_call(node, aten.add.Tensor) and arguments(node)["alpha"] == 1:
        left, right = node.args[:2]
        for scores, other in ((left, right), (right, left)):
            if isinstance(scores, Node) and isinstance(other, Node) and _leads_to_product(view, scores):
                return scores, MaskTerm(other)
    if is_call(node, aten.where.self):
        condition, kept, other = node.args
        if isinstance(kept, Node) and isinstance(condition, Node):
            for scores, filler, inverted in ((kept, other, False), (other, kept, True)):
                fill = fill_value(view, filler)
                if (
                    isinstance(scores, Node)
                    and fill is not None
                    and fill <= _LOWEST
                    and _leads_to_product(view, scores)
                ):
                    return scores, MaskTerm(condition, inverted, fill)
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, condition, filler = node.args[:3]
        fill = fill_value(view, filler)
        if isinstance(scores, Node) and isinstance(condition, Node) and fill is not None and fill <= _LOWEST:
            return scores, MaskTerm(condition, True, fill)
    return None


def fill_value(view: GraphView, value: Any) -> float | None:
    """The number that a tensor is filled with, None where that is not known."""
    if is_call(value, aten.full_like.default, aten.full.default):
        return scalar_of(view, value.args[1])
    return scalar_of(view, value)


def _leads_to_product(view: GraphView, node: Node) -> bool:
    for _ in range(12):
        if is_call(node, *PRODUCTS):
            return True
        factor = scalar_factor(view, node)
        if factor is not None:
            node = factor[0]
        elif is_call(node, *CASTS, *VIEWS):
            node = first_tensor(node)
        else:
            term = _mask_term(view, node)
            if term is None:
                return False
            node = term[0]
    return False


def scalar_factor(view: GraphView, node: Node) -> tuple[Node, float] | None:
    """`(x, c)` where the node is `x * c` with a constant c."""
    if is_call(node, *_MULTIPLY):
        for tensor, factor in (node.args[:2], node.args[1::-1]):
            value = scalar_of(view, factor)
            if value is not None and isinstance(tensor, Node) and scalar_of(view, tensor) is None:
                return tensor, value
    if is_call(node, *_DIVIDE):
        value = scalar_of(view, node.args[1])
        if value and isinstance(node.args[0], Node):
            return node.args[0], 1.0 / value
    return None
