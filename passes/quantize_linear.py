"""Replace a linear by its dynamically quantized twin.

    x ── linear(W, b) ── y      becomes      x ── graphwright.int8_linear(Wq, s, b) ── y

Weights are quantized once, per output channel; activations per token, when the program runs. With `exponents`, channels
of the activation are scaled first and the weight's columns the other way, which is exact, being powers of two:

    x ── · 2^-e ── graphwright.int8_linear(quantized W · 2^e, s, b) ── y
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import int8_linear
from ..kernels.contract import Spec
from ..patterns.linear import LinearSite
from ..patterns.nodes import aten, dtype_of, is_call
from .base import SitePass
from .edit import Edit


@dataclass(frozen=True)
class QuantizeLinear(SitePass[LinearSite]):
    """W8A8: int8 weights per output channel, int8 activations per token.

    Attributes:
        exponents: For each input channel the power of two that moves from the activation to the weight.
    """

    name: ClassVar[str] = "quantize_linear"

    exponents: tuple[int, ...] = ()

    def guard(self, site: LinearSite, edit: Edit) -> str | None:
        """The contract of `graphwright::int8_linear`, and one exponent a channel."""
        rows, columns = site.out_features, site.in_features
        if self.exponents and len(self.exponents) != columns:
            return f"{len(self.exponents)} exponents for {columns} input channels"
        return int8_linear.CONTRACT.check(
            x=site.input.meta["val"],
            weight=Spec((rows, columns), torch.int8),
            scale=Spec((rows,), torch.float32),
            bias=None if site.bias is None else site.bias.meta["val"],
        )

    def rewrite(self, site: LinearSite, edit: Edit) -> None:
        """Store the quantized weight and call the operator."""
        quantized: dict[str, Tensor] = {}

        def make(part: str) -> Tensor:
            if not quantized:
                weight = edit.constant(site.weight)
                factors = _powers(self.exponents, weight.device) if self.exponents else None
                quantized["int8"], quantized["scale"] = int8_linear.quantize_per_channel(weight, factors)
            return quantized[part]

        mark = f".{_digest(self.exponents)}" if self.exponents else ""
        values = edit.buffer(f"{site.weight_name}.int8{mark}", lambda: make("int8"))
        scale = edit.buffer(f"{site.weight_name}.int8_scale{mark}", lambda: make("scale"))
        source = self._scaled(site, edit) if self.exponents else site.input
        output = edit.call(torch.ops.graphwright.int8_linear.default, source, values, scale, site.bias, like=site.node)
        edit.replace(site.node, output)

    def _scaled(self, site: LinearSite, edit: Edit) -> Node:
        """The activation with its channels scaled; sites that read one activation share it."""
        dtype, device = dtype_of(site.input) or torch.float32, site.input.meta["val"].device
        inverse = tuple(-exponent for exponent in self.exponents)
        name = f"channel_scale.{_digest(self.exponents)}.{str(dtype).removeprefix('torch.')}"
        factors = edit.buffer(name, lambda: _powers(inverse, device).to(dtype))
        source = edit.current(site.input)
        for user in source.users:
            if is_call(user, aten.mul.Tensor) and user.args == (source, factors):
                return user
        return edit.call(aten.mul.Tensor, source, factors, like=site.node)


def _powers(exponents: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.ldexp(torch.ones(len(exponents), device=device), torch.tensor(exponents, device=device))


def _digest(exponents: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(exponents).encode()).hexdigest()[:12]
