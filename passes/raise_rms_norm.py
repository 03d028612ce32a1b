"""Raise RMSNorm spelled out to one `aten.rms_norm`.

    x ── float32 ── pow(2) ── mean(-1) ── + eps ── rsqrt ── · x ── cast ── · weight    becomes    rms_norm(x, weight)

Also without a weight, with `x * x`, and with Gemma's `(1 + weight)`, which is computed once and stored. Exact up to the
rounding of the casts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..patterns.graph import Refusal, scalar_of
from ..patterns.nodes import CASTS, aten, dtype_of, is_call, shape_of, strip
from .base import Pass, PassResult
from .edit import Edit

_ADDS = (aten.add.Tensor, aten.add.Scalar)


@dataclass(frozen=True)
class RaiseRmsNorm(Pass):
    """One rms_norm where its formula stood."""

    name: ClassVar[str] = "raise_rms_norm"
    after: ClassVar[tuple[str, ...]] = ("drop_noops",)
    requires: ClassVar[str] = "exported"
    ensures: ClassVar[str] = "exported"

    def run(self, edit: Edit) -> PassResult:
        """Anchor on every rsqrt."""
        changed, refusals = 0, []
        for node in list(edit.graph.nodes):
            if not is_call(node, aten.rsqrt.default):
                continue
            found = _match(edit, node)
            if isinstance(found, Refusal):
                refusals.append(found)
                continue
            changed += 1
            _rewrite(edit, *found)
        return PassResult(changed, tuple(refusals))


def _match(edit: Edit, rsqrt: Node) -> tuple[Node, float, Node] | Refusal:
    """(input, eps, the normalised value in the input's dtype)."""
    view = edit.view
    shifted = rsqrt.args[0]
    if not is_call(shifted, *_ADDS):
        return view.refuse(rsqrt, "no eps is added before the root", depth=0)
    assert isinstance(shifted, Node)
    mean, eps = shifted.args[0], scalar_of(view, shifted.args[1])
    if not is_call(mean, aten.mean.dim) or eps is None:
        return view.refuse(rsqrt, "the root is not of a mean plus a constant", depth=1)
    assert isinstance(mean, Node)
    square = mean.args[0]
    dims, keep = list(mean.args[1]), mean.args[2] if len(mean.args) > 2 else False  # pyright: ignore[reportArgumentType]
    if not isinstance(square, Node) or not keep or dims not in ([-1], [len(shape_of(square)) - 1]):
        return view.refuse(rsqrt, "the mean is not over the last dimension", depth=2, dims=dims)
    if (
        (is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2)
        or (is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1])
        or is_call(square, aten.square.default)
    ):
        base = square.args[0]
    else:
        return view.refuse(rsqrt, "the mean is not of squares", depth=3, operator=str(square.target))
    assert isinstance(base, Node)
    users = list(rsqrt.users)
    if len(users) != 1 or not is_call(users[0], aten.mul.Tensor) or base not in users[0].args:
        return view.refuse(rsqrt, "the root does not scale the input", depth=4)
    return base, eps, users[0]


def _rewrite(edit: Edit, base: Node, eps: float, scaled: Node) -> None:
    source = strip(base, CASTS)
    narrowed = scaled
    users = list(scaled.users)
    if len(users) == 1 and is_call(users[0], *CASTS) and dtype_of(users[0]) == dtype_of(source):
        narrowed = users[0]
    output, weight = _with_weight(edit, narrowed, shape_of(source)[-1])
    start = source if dtype_of(source) == dtype_of(output) else base
    if weight is not None and dtype_of(weight) != dtype_of(start):
        output, weight = narrowed, None
        start = source if dtype_of(source) == dtype_of(output) else base
    norm = edit.call(aten.rms_norm.default, start, [shape_of(source)[-1]], weight, eps, like=output)
    edit.replace(output, norm)


def _with_weight(edit: Edit, node: Node, size: object) -> tuple[Node, Node | None]:
    """The product with the gain, and the gain's placeholder, where the node's only user is such a product."""
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], aten.mul.Tensor):
        return node, None
    product = users[0]
    other = product.args[1] if product.args[0] is node else product.args[0]
    if not isinstance(other, Node) or shape_of(other) != (size,):
        return node, None
    if edit.view.is_weight(other):
        return product, other
    gain = _offset_gain(edit, other)
    if gain is None:
        return node, None
    weight, offset = gain
    name = f"{edit.view.target(weight)}.plus_{offset:g}"
    tensor = edit.constant(weight)
    return product, edit.buffer(name, lambda: (tensor.detach().float() + offset).to(_gain_dtype(tensor, node)))


def _offset_gain(edit: Edit, node: Node) -> tuple[Node, float] | None:
    """(weight, c) where the node is `c + weight`, casts stepped over."""
    if not is_call(node, *_ADDS):
        return None
    for weight, offset in (node.args[:2], node.args[1::-1]):
        value = scalar_of(edit.view, offset)
        if value is not None and isinstance(weight, Node):
            weight = strip(weight, CASTS)
            if edit.view.is_weight(weight):
                return weight, value
    return None


def _gain_dtype(weight: torch.Tensor, normalised: Node) -> torch.dtype:
    return dtype_of(normalised) or weight.dtype
