"""Rotate an attention's heads: values by learned matrices that are folded (R2), queries and keys as they run (R3).

    linear(Wv) ── sdpa ── linear(Wo)      becomes      linear(R2^T Wv) ── sdpa ── linear(Wo R2)      per key-value head
    sdpa(q, k, v)                         becomes      sdpa(hadamard(q), hadamard(k), v)             before the cache

R2 is free. R3 cannot be folded, since rotary embeddings lie between the projections and the keys; it is worth its time
only where keys are quantized when they are written. Both are exact: the attention's scores and outputs are as before.
A cache holds rotated keys and values then, so all phases must do the same.

Source: SpinQuant (Liu et al. 2024, arXiv:2405.16406), figure 1, R2 and R3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import hadamard
from ..patterns.attention import AttentionSite
from ..patterns.flow import LINEAR
from ..patterns.graph import Refusal
from ..patterns.nodes import arguments
from ..patterns.value_path import ValuePath, find_value_path, new_operand, per_head
from .base import SitePass
from .edit import Edit
from .rotate import not_a_rotation, sharpened


@dataclass(frozen=True)
class RotateHeads(SitePass[AttentionSite]):
    """R2 and R3 of one attention.

    Attributes:
        values: Name of the profile's tensor R2 [kv_heads, head_dim, head_dim]; "" leaves the values alone.
        keys: Whether queries and keys are rotated by a Hadamard matrix.
    """

    name: ClassVar[str] = "rotate_heads"
    exact: ClassVar[bool] = True

    values: str = ""
    keys: bool = False

    def guard(self, site: AttentionSite, edit: Edit) -> str | None:
        """A proved path of the values and orthogonal matrices; queries that only the attention reads."""
        if self.values:
            found = find_value_path(edit.view, site)
            if isinstance(found, Refusal):
                return str(found)
            reason = not_a_rotation(edit, self.values, (found.kv_heads, found.head_dim, found.head_dim))
            if reason is not None:
                return reason
        if self.keys:
            if len(site.query.users) != 1:
                return "something else reads the queries"
            new = new_operand(edit.view, site.node, site.key)
            return str(new) if isinstance(new, Refusal) else hadamard.CONTRACT.check(x=site.query.meta["val"])
        return None

    def rewrite(self, site: AttentionSite, edit: Edit) -> None:
        """Fold R2, insert R3."""
        if self.values:
            path = find_value_path(edit.view, site)
            assert isinstance(path, ValuePath)
            _fold(edit, path, sharpened(edit.shared[self.values]))
        if self.keys:
            new = new_operand(edit.view, site.node, site.key)
            assert isinstance(new, Node)
            for node in (site.query, new):
                rotated = edit.call(torch.ops.graphwright.hadamard.default, node, like=node, before=node.next)
                edit.replace(node, rotated)


def _fold(edit: Edit, path: ValuePath, rotation: Tensor) -> None:
    def value(stored: Tensor) -> Tensor:
        return torch.einsum("ked,ke...->kd...", rotation, stored.double().unflatten(0, (path.kv_heads, -1))).flatten(
            0, 1
        )

    def output(stored: Tensor) -> Tensor:
        columns = stored.double().unflatten(1, (path.heads, -1))
        return torch.einsum("nhe,hed->nhd", columns, per_head(rotation, path.heads)).flatten(1)

    for node, change in ((path.value, value), (path.output, output)):
        # A rotation of the stream, applied before, has replaced both linears.
        now = edit.current(node)
        args = arguments(now)
        made = []
        for name in ("weight", "bias"):
            stored = args[name]
            if isinstance(stored, Node) and (name == "weight" or change is value):
                tensor = edit.constant(stored)
                target = f"{edit.view.target(stored)}.heads"
                stored = edit.buffer(target, lambda t=tensor, c=change: c(t.detach()).to(t.dtype))
            made.append(stored)
        weight, bias = made
        extra = [bias] if bias is not None else []
        edit.replace(now, edit.call(LINEAR, now.args[0], weight, *extra, like=node))
