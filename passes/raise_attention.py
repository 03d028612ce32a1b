"""Raise attention of any form to one `aten.scaled_dot_product_attention`, with repeated heads folded.

    softmax(q @ k^T * scale + mask) @ v                              becomes     sdpa(q, k, v, mask, scale=scale)
    softmax(baddbmm(offset, q, k^T) + mask) @ v                      becomes     sdpa(q, k, v, offset + mask)
    sdpa(q, repeat_interleave(k), repeat_interleave(v))              becomes     sdpa(q, k, v, enable_gqa=True)

The matching is in `patterns/attention_forms.py`. Exact up to the rounding of casts around an upcast softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from ..patterns.attention_forms import SDPA, AttentionForm, Operand, match_attention
from ..patterns.attention_scores import MaskTerm, Offset
from ..patterns.graph import Refusal
from ..patterns.nodes import RESHAPES, arguments, aten, dtype_of, same_shape, shape_of
from .base import Pass, PassResult
from .edit import Edit


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """One SDPA with grouped heads, whatever form attention came in."""

    name: ClassVar[str] = "raise_attention"
    after: ClassVar[tuple[str, ...]] = ("drop_noops",)
    requires: ClassVar[str] = "exported"
    ensures: ClassVar[str] = "exported"

    def run(self, edit: Edit) -> PassResult:
        """Rewrite every attention that is not canonical yet."""
        changed, refusals = 0, []
        for node in list(edit.graph.nodes):
            form = match_attention(edit.view, node)
            if isinstance(form, Refusal):
                refusals.append(form)
            elif form is not None and not _is_canonical(form):
                _rewrite(edit, form)
                changed += 1
        return PassResult(changed, tuple(refusals))


def _is_canonical(form: AttentionForm) -> bool:
    if form.anchor.target is not SDPA:
        return False
    args = arguments(form.anchor)
    same = args["key"] is form.key.node and args["value"] is form.value.node
    return same and bool(args["enable_gqa"]) == (form.groups > 1)


def _rewrite(edit: Edit, form: AttentionForm) -> None:
    output = form.output
    flat = len(shape_of(form.query.node)) == 3
    dtype = dtype_of(form.value.node)
    query, key, value = (_operand(edit, operand, output, flat, dtype) for operand in (form.query, form.key, form.value))
    if form.offset is None:
        mask = _mask(edit, form.mask, output, flat, dtype)
    else:
        mask = _offset_mask(edit, form.offset, form.mask, output, flat, dtype)
    attention = edit.call(
        SDPA,
        query,
        key,
        value,
        mask,
        0.0,
        form.is_causal,
        scale=form.scale,
        enable_gqa=form.groups > 1,
        like=output,
    )
    result = attention
    if flat:
        result = edit.call(aten.squeeze.dim, result, 0, like=output)
    elif len(shape_of(output)) == 3:
        for user in list(output.users):
            if user.target in RESHAPES and same_shape(shape_of(user), shape_of(attention)):
                edit.replace(user, attention)
        result = edit.call(aten.flatten.using_ints, result, 0, 1, like=output)
    if dtype_of(result) != dtype_of(output):
        result = edit.call(aten.to.dtype, result, dtype_of(output), like=output)
    edit.replace(output, result)


def _operand(edit: Edit, operand: Operand, output: Node, flat: bool, dtype: torch.dtype | None) -> Node:
    node = operand.node
    if operand.transposed:
        node = edit.call(aten.transpose.int, node, -1, -2, like=output)
    if flat:
        node = edit.call(aten.unsqueeze.default, node, 0, like=output)
    return node if dtype_of(node) == dtype else edit.call(aten.to.dtype, node, dtype, like=output)


def _mask(edit: Edit, mask: MaskTerm | None, output: Node, flat: bool, dtype: torch.dtype | None) -> Node | None:
    if mask is None:
        return None
    node = mask.node
    if mask.inverted:
        node = edit.call(aten.logical_not.default, node, like=output)
    if dtype_of(node) is not torch.bool and dtype_of(node) != dtype:
        node = edit.call(aten.to.dtype, node, dtype, like=output)
    if mask.fill is not None and mask.fill != float("-inf"):
        # A row that masks every key averages over all of them when the fill is finite, and gives zeros when it is not.
        zero = edit.call(aten.zeros_like.default, node, dtype=dtype, like=output)
        node = edit.call(aten.where.ScalarOther, node, zero, mask.fill, like=output)
    return edit.call(aten.unsqueeze.default, node, 0, like=output) if flat else node


def _offset_mask(
    edit: Edit, offset: Offset, mask: MaskTerm | None, output: Node, flat: bool, dtype: torch.dtype | None
) -> Node:
    """One mask of what is added to the scores and of what limits them."""
    node = offset.node
    if offset.heads is not None:
        node = edit.call(aten.unflatten.int, node, 0, [-1, offset.heads], like=output)
    if dtype_of(node) != dtype:
        node = edit.call(aten.to.dtype, node, dtype, like=output)
    if flat and len(shape_of(node)) == 3:
        node = edit.call(aten.unsqueeze.default, node, 0, like=output)
    if mask is None:
        return node
    if mask.fill is None:
        limit = _mask(edit, mask, output, flat, dtype)
        return edit.call(aten.add.Tensor, node, limit, like=output)
    keep = _mask(edit, replace(mask, fill=None), output, flat, dtype)
    # Not the sum with a fill: a row that masks every key is the same in all of them, whatever their offsets are.
    return edit.call(aten.where.ScalarOther, keep, node, mask.fill, like=output)
