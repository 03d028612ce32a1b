"""The linear that makes the queries or keys of an attention, head by head, where nothing but layout lies between.

    x ── linear(W, b) ── view, split, transpose ── [batch, heads, tokens, head_dim]

Which rows of W make which head is read off the layout itself, so one linear for queries, keys and values together, in
whatever order, is as good as three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from .flow import LINEAR
from .graph import GraphView, Refusal
from .nodes import PARTS, VIEWS, arguments, is_call, shape_of


@dataclass(frozen=True)
class HeadProjection:
    """Head h of an operand is ``source @ weight[rows[h]].T + bias[rows[h]]``.

    Attributes:
        source: [.., features], token by token as the operand.
        weight: Placeholder [out, features].
        bias: Placeholder [out], or None.
        rows: int64 [heads, head_dim].
    """

    source: Node
    weight: Node
    bias: Node | None
    rows: Tensor


def head_projection(view: GraphView, operand: Node) -> HeadProjection | Refusal:
    """Prove how an operand [batch, heads, tokens, head_dim] is projected.

    Refused, with the fact: anything but layout between the linear and the operand, as a rotary embedding or a norm of
    heads; a weight that is computed; tokens in another order; heads that are not the same rows for every token.
    """
    node, chain = operand, []
    while is_call(node, *VIEWS, *PARTS):
        chain.append(node)
        node = node.args[0]
        assert isinstance(node, Node)
    if not is_call(node, LINEAR):
        return view.refuse(operand, "heads are changed after their projection", depth=1, operator=str(node.target))
    source, weight, bias = (arguments(node)[name] for name in ("input", "weight", "bias"))
    if not view.is_weight(weight) or (bias is not None and not view.is_weight(bias)):
        return view.refuse(node, "the projection's weight is computed", depth=2, weight=weight.name)
    layouts = view.layouts(operand, node, chain)
    features = int(shape_of(weight)[0])
    if layouts is None or len(shape_of(operand)) != 4:
        return view.refuse(operand, "the layout of heads cannot be evaluated", depth=3)
    rows: Tensor | None = None
    for index, _ in layouts:
        token, row = index // features, index % features
        batch, _, tokens, _ = index.shape
        order = torch.arange(batch * tokens).view(batch, 1, tokens, 1)
        rows = row[0, :, 0] if rows is None else rows
        if not torch.equal(token, order.expand_as(token)):
            return view.refuse(operand, "tokens are reordered after their projection", depth=4)
        if not torch.equal(row, rows[:, None].expand_as(row)):
            return view.refuse(operand, "heads are not the same rows of the projection for every token", depth=4)
    assert rows is not None
    return HeadProjection(source, weight, bias, rows)
