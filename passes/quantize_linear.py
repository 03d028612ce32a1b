"""Replace a linear by its dynamically quantized twin.

    x ── linear(W, b) ── y      becomes      x ── graphwright.int8_linear(Wq, s, b) ── y

Weights are quantized once, per output channel; activations per token, when the program runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..kernels import int8_linear
from ..kernels.contract import Spec
from ..patterns.graph import shape_of
from ..patterns.linear import LinearSite
from .base import SitePass
from .edit import Edit


@dataclass(frozen=True)
class QuantizeLinear(SitePass[LinearSite]):
    """W8A8: int8 weights per output channel, int8 activations per token."""

    name: ClassVar[str] = "quantize_linear"

    def guard(self, site: LinearSite, edit: Edit) -> str | None:
        """The contract of `graphwright::int8_linear`."""
        rows, columns = site.out_features, site.in_features
        return int8_linear.CONTRACT.check(
            x=site.input.meta["val"],
            weight=Spec((rows, columns), torch.int8),
            scale=Spec((rows,), torch.float32),
            bias=None if site.bias is None else site.bias.meta["val"],
        )

    def rewrite(self, site: LinearSite, edit: Edit) -> None:
        """Store the quantized weight and call the operator."""
        weight = edit.constant(site.weight)
        quantized: dict[str, torch.Tensor] = {}

        def make(part: str) -> torch.Tensor:
            if not quantized:
                quantized["int8"], quantized["scale"] = int8_linear.quantize_per_channel(weight)
            return quantized[part]

        values = edit.buffer(f"{site.weight_name}.int8", lambda: make("int8"))
        scale = edit.buffer(f"{site.weight_name}.int8_scale", lambda: make("scale"))
        output = edit.call(
            torch.ops.graphwright.int8_linear.default, site.input, values, scale, site.bias, like=site.node
        )
        assert shape_of(output)[-1] == site.out_features
        edit.replace(site.node, output)
