"""Fold what norms do per channel into the linears that read them.

    h ── rms_norm(g) ── linear(W)        becomes        h ── rms_norm ── linear(W diag(g))
    h ── layer_norm(g, b) ── linear(W, c)     becomes     h ── rms_norm ── linear(W diag(g), c + W b)

The second needs a stream without mean: every writer gets the mean over its output channels subtracted from its weight
and bias, every embedding from its rows. Nothing but norms reads a `ResidualStream`, so only they could have seen it.

`rewrite_stream` also multiplies a rotation into the same weights (`passes/rotate.py`), so that no weight is made twice.
Weights are computed in float64, a few rows at a time, and rounded once. Exact up to that rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..patterns.flow import LINEAR
from ..patterns.nodes import arguments
from ..patterns.norm import LAYER_NORM, RMS_NORM
from ..patterns.residual import EMBEDDING, ResidualStream
from .base import SitePass
from .edit import Edit


@dataclass(frozen=True)
class FoldNorm(SitePass[ResidualStream]):
    """Norms of the stream lose gain and shift; their readers' weights take them over."""

    name: ClassVar[str] = "fold_norm"
    exact: ClassVar[bool] = True
    ensures: ClassVar[str] = "canonical"

    def guard(self, site: ResidualStream, edit: Edit) -> str | None:
        """One form of norm: a mean-free stream is not what an RMSNorm beside a LayerNorm saw."""
        return mixed_norms(site)

    def rewrite(self, site: ResidualStream, edit: Edit) -> None:
        """Make the folded weights."""
        rewrite_stream(site, edit, None, "folded")


def mixed_norms(site: ResidualStream) -> str | None:
    """The reason why the norms of a stream cannot be folded together, or None."""
    if len({norm.target for norm, _ in site.norms}) > 1:
        return "RMSNorms and LayerNorms read one stream"
    return None


def rewrite_stream(site: ResidualStream, edit: Edit, rotation: Tensor | None, label: str) -> None:
    """Fold the norms of a stream, and let it carry h R instead of h.

    Args:
        site: The stream.
        edit: The open edit.
        rotation: Orthogonal R [width, width], or None for the identity.
        label: Part of the new weights' names, one for each rotation.
    """
    centre = site.form == "layer_norm"
    for node in site.embeddings:
        if rotation is not None or centre:
            _rewrite_embedding(edit, node, rotation, centre, label)
    norm_of = {linear: norm for norm, linears in site.norms for linear in linears}
    # In graph order, so that a linear that is read and written is made once, after what it reads.
    for linear in sorted({*site.writers, *norm_of}, key=_position(edit)):
        writes = linear in site.writers
        if linear in norm_of or rotation is not None or centre:
            _rewrite_linear(edit, linear, norm_of.get(linear), writes, rotation, centre, label)
    for norm, _ in site.norms:
        args = arguments(norm)
        plain = edit.call(RMS_NORM, args["input"], args["normalized_shape"], None, args["eps"], like=norm)
        edit.replace(norm, plain)


def _rewrite_embedding(edit: Edit, node: Node, rotation: Tensor | None, centre: bool, label: str) -> None:
    now = edit.current(node)
    table = now.args[0]
    assert isinstance(table, Node)

    def rows(block: Tensor) -> Tensor:
        block = block - block.mean(-1, keepdim=True) if centre else block
        return block if rotation is None else block @ rotation.to(block)

    name = f"{edit.view.target(table)}.{label}.written"
    made = edit.buffer(name, lambda: _in_blocks(edit.constant(table), rows))
    indices, *rest = now.args[1:]
    options: dict[str, Any] = dict(now.kwargs)
    edit.replace(node, edit.call(EMBEDDING, made, indices, *rest, like=node, **options))


def _rewrite_linear(
    edit: Edit, node: Node, norm: Node | None, writes: bool, rotation: Tensor | None, centre: bool, label: str
) -> None:
    now = edit.current(node)
    args = arguments(now)
    weight, bias = args["weight"], args["bias"]
    gain, shift = _gain_and_shift(edit, norm)
    name = f"{edit.view.target(weight)}.{label}.{_mark(edit, norm, writes)}"

    def made() -> Tensor:
        stored = edit.constant(weight)

        def read(block: Tensor) -> Tensor:
            block = block if gain is None else block * gain.to(block)
            return block if norm is None or rotation is None else block @ rotation.to(block)

        folded = _in_blocks(stored, read, stored.dtype if not writes else torch.float64)
        return _written(folded, rotation, centre).to(stored.dtype) if writes else folded

    new_weight = edit.buffer(name, made)
    new_bias = bias
    if (bias is not None and writes and (rotation is not None or centre)) or shift is not None:

        def made_bias() -> Tensor:
            stored = edit.constant(weight)
            total = torch.zeros(len(stored), dtype=torch.float64, device=stored.device)
            if bias is not None:
                total = total + edit.constant(bias).double()
            if shift is not None:
                total = total + stored.double() @ shift.double()
            return (_written(total, rotation, centre) if writes else total).to(stored.dtype)

        new_bias = edit.buffer(f"{name}.bias", made_bias)
    # The source is read from the original, so that a norm that is replaced later redirects this call as well.
    source = node.args[0]
    edit.replace(node, edit.call(LINEAR, source, new_weight, *([new_bias] if new_bias is not None else []), like=node))


def _written(value: Tensor, rotation: Tensor | None, centre: bool) -> Tensor:
    """A writer's weight [width, K] or bias [width] for a stream that carries (h - mean) R."""
    value = value - value.mean(0, keepdim=True) if centre else value
    return value if rotation is None else rotation.to(value).t() @ value


def _gain_and_shift(edit: Edit, norm: Node | None) -> tuple[Tensor | None, Tensor | None]:
    if norm is None:
        return None, None
    args = arguments(norm)
    gain, shift = args["weight"], args.get("bias") if norm.target is LAYER_NORM else None
    return (
        None if gain is None else edit.constant(gain).detach(),
        None if shift is None else edit.constant(shift).detach(),
    )


def _mark(edit: Edit, norm: Node | None, writes: bool) -> str:
    """Tells apart what one shared weight becomes behind different norms."""
    parts = "written" if writes else ""
    if norm is None:
        return parts
    gain = arguments(norm)["weight"]
    behind = hashlib.sha256(str(gain and edit.view.target(gain)).encode()).hexdigest()[:8]
    return f"{parts}read.{behind}"


_ROWS = 4096


def _in_blocks(stored: Tensor, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """A function of rows in float64, applied to a few of them at a time."""
    blocks = stored.detach().split(_ROWS)
    return torch.cat([change(block.double()).to(dtype or stored.dtype) for block in blocks])


def _position(edit: Edit) -> Callable[[Node], int]:
    positions = {node: position for position, node in enumerate(edit.graph.nodes)}
    return positions.__getitem__
