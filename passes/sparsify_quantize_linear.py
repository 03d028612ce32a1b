"""Keep n of every m channels of what a linear reads, and multiply in int8.

    x ── linear(W, b) ── y      becomes      x ── graphwright.nm_int8_linear(f, Wq, s, b) ── y

Weights are quantized as `quantize_linear` quantizes them, under the same names, so that dense phases share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import int8_linear, nm_int8_linear
from ..kernels.contract import Spec
from ..kernels.nm_sparsify import pattern_reason
from ..patterns.linear import LinearSite
from .base import SitePass
from .edit import Edit
from .sparsify_activations import Selection


@dataclass(frozen=True)
class SparsifyQuantizeLinear(SitePass[LinearSite], Selection):
    """n:m sparse activations by a `Selection`, then W8A8."""

    name: ClassVar[str] = "sparsify_quantize_linear"

    def guard(self, site: LinearSite, edit: Edit) -> str | None:
        """The operator's contract, and a weight that can be ranked by."""
        rows, columns = site.out_features, site.in_features
        return (
            self.refuse(site, edit)
            or nm_int8_linear.CONTRACT.check(
                x=site.input.meta["val"],
                factors=Spec((columns,), torch.float32),
                weight=Spec((rows, columns), torch.int8),
                scale=Spec((rows,), torch.float32),
                bias=None if site.bias is None else site.bias.meta["val"],
                n=self.n,
                m=self.m,
            )
            or pattern_reason(self.n, self.m)
        )

    def rewrite(self, site: LinearSite, edit: Edit) -> None:
        """Store factors and quantized weight, and call the operator."""
        made: dict[str, Tensor] = {}

        def part(name: str) -> Tensor:
            if not made:
                made["int8"], made["scale"] = int8_linear.quantize_per_channel(edit.constant(site.weight))
            return made[name]

        ranks = self.ranks(site, edit)
        values = edit.buffer(f"{site.weight_name}.int8", lambda: part("int8"))
        scale = edit.buffer(f"{site.weight_name}.int8_scale", lambda: part("scale"))
        operands = (site.input, ranks, values, scale, site.bias, self.n, self.m)
        edit.replace(site.node, edit.call(torch.ops.graphwright.nm_int8_linear.default, *operands, like=site.node))
