"""Drop what computes nothing: asserts, dropout in eval, and views, casts, copies and arithmetic that change nothing.

    x ── to(float32) ── slice(0:max) ── dropout(0.1, False) ── y      becomes      x ── y      (x is float32)

Every view becomes a reshape, so that a later rewrite may hand it another memory layout; a copy made only for a view
goes, and of two reshapes in a row the first. Exact.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from ..patterns.nodes import RESHAPES, arguments, aten, dtype_of, first_tensor, is_call, same_shape, same_size, shape_of
from .base import Pass, PassResult
from .edit import ASSERTS, Edit

_SAME_SHAPE_IS_NOOP = frozenset(
    {
        *RESHAPES,
        aten.expand.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
    }
)
_COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default})
_ALIASES = frozenset({aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.detach_.default})


@dataclass(frozen=True)
class DropNoops(Pass):
    """Remove operators that change nothing, until none is left."""

    name: ClassVar[str] = "drop_noops"
    requires: ClassVar[str] = "exported"
    ensures: ClassVar[str] = "exported"

    def run(self, edit: Edit) -> PassResult:
        """Drop no-ops in one forward walk; what a removal makes a no-op lies behind it and is met later."""
        changed = 0
        for node in list(edit.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in ASSERTS:
                edit.erase(node)
                changed += 1
                continue
            same = _same_as(edit, node)
            if same is not None:
                edit.replace(node, same)
                changed += 1
            elif node.target in RESHAPES and len(node.args) == 2:
                source = _before_reshapes(node)
                if _is_identity(node, source):
                    edit.replace(node, source)
                    changed += 1
                elif node.target is not aten.reshape.default or source is not node.args[0]:
                    edit.replace(node, edit.call(aten.reshape.default, source, node.args[1], like=node))
                    changed += 1
        return PassResult(changed)


def _same_as(edit: Edit, node: Node) -> Node | None:
    """The input that the node equals, or None."""
    if not node.args or not isinstance(node.args[0], Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    source = node.args[0]
    target: Any = node.target
    if target in _ALIASES or _is_identity(node, source):
        return source
    if target in _COPIES and not _is_returned(node) and not edit.view.is_state(source):
        # A copy made for a later view is turned into a reshape together with that view.
        return None if any(user.target in RESHAPES for user in node.users) else source
    return None


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_identity(node: Node, source: Node) -> bool:
    target: Any = node.target
    same = dtype_of(node) == dtype_of(source) and same_shape(shape_of(node), shape_of(source))
    if not same:
        return False
    args = arguments(node)
    if target in _SAME_SHAPE_IS_NOOP:
        return True
    if target is aten.slice.Tensor:
        end = args["end"]
        whole = end is None or (isinstance(end, int) and end >= sys.maxsize)
        return args["step"] == 1 and (whole or same_size(args["start"] or 0, 0))
    if target in (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device):
        return node.meta["val"].device == source.meta["val"].device
    if target is aten.dropout.default:
        return args["p"] == 0.0 or not args["train"]
    if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return args["other"] == 1 and not isinstance(args["other"], bool)
    if target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        return isinstance(args["other"], int | float) and args["other"] == 0
    return target in (aten.permute.default,) and list(args["dims"]) == list(range(len(shape_of(node))))


def _before_reshapes(node: Node) -> Node:
    """What a reshape really reads: copies and other reshapes keep the elements' order, so they do not count."""
    source = first_tensor(node)
    while is_call(source, *_COPIES, aten.reshape.default):
        source = first_tensor(source)
    return source
