"""Replace a linear by one with 4-bit weights.

    x ── linear(W, b) ── y      becomes      x ── graphwright.int4_linear(Wq, steps, scale, sums, b) ── y      A8, A4
                                becomes      x ── graphwright.int4_weight_linear(Wq, steps, scale, b) ── y     A16

Where the profile holds the rounded weight (GPTQ), it is taken from there; else the weight is rounded to nearest. With
`hadamard` the operator rotates its input as it quantizes it, and the weight is rotated against it before it is rounded:
R4, at no cost in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import hadamard, int4_linear, int4_weight_linear
from ..kernels.contract import Spec
from ..kernels.int4_weights import ROWS, Int4, group_reason, quantize_groups
from ..patterns.linear import LinearSite
from .base import SitePass
from .edit import Edit


@dataclass(frozen=True)
class QuantizeLinearInt4(SitePass[LinearSite]):
    """W4A4, W4A8 or W4A16.

    Attributes:
        group: Input channels that share a step; must divide them.
        activation_bits: 4, 8, or 16 for activations that stay as they are.
        clip: Share of a token's range that is kept.
        hadamard: Rotate the input when the program runs.
        weight: Prefix of the profile's tensors `.packed`, `.steps`, `.scale` and `.sums`; "" rounds to nearest here.
    """

    name: ClassVar[str] = "quantize_linear_int4"

    group: int = 64
    activation_bits: int = 8
    clip: float = 1.0
    hadamard: bool = False
    weight: str = ""

    def guard(self, site: LinearSite, edit: Edit) -> str | None:
        """The operator's contract, a group that divides, and the profile's tensors where they are named."""
        if self.activation_bits not in (4, 8, 16) or not 0 < self.clip <= 1:
            return f"activations of {self.activation_bits} bits clipped to {self.clip} are not supported"
        if self.hadamard and self.activation_bits == 16:
            return "only a quantized input is rotated"
        rows, columns = site.out_features, site.in_features
        reason = group_reason(columns, self.group)
        if reason is not None:
            return reason
        blocks = -(-rows // ROWS)
        shapes = {
            "packed": Spec((blocks, columns, ROWS // 2), torch.uint8),
            "steps": Spec((columns // self.group, blocks * ROWS), torch.int8),
            "scale": Spec((rows,), torch.float32),
            "sums": Spec((rows,), torch.int32),
        }
        for part, spec in shapes.items() if self.weight else ():
            stored = edit.shared.get(f"{self.weight}.{part}")
            if stored is None or tuple(stored.shape) != tuple(spec.shape) or stored.dtype != spec.dtype:
                found = "nothing" if stored is None else f"{stored.dtype}{list(stored.shape)}"
                return f"{self.weight}.{part} is {found}, expected {spec.dtype}{list(spec.shape)}"
        bias = None if site.bias is None else site.bias.meta["val"]
        operands = {"x": site.input.meta["val"], "weight": shapes["packed"], "steps": shapes["steps"], "bias": bias}
        if self.activation_bits == 16:
            return int4_weight_linear.CONTRACT.check(**operands, scale=shapes["scale"])
        sums, scale, bits = shapes["sums"], shapes["scale"], self.activation_bits
        return int4_linear.CONTRACT.check(**operands, scale=scale, sums=sums, bits=bits)

    def rewrite(self, site: LinearSite, edit: Edit) -> None:
        """Store the packed weight and call the operator."""
        prefix = self.weight or f"{site.weight_name}.int4.{self.group}{'h' if self.hadamard else ''}"
        made: list[Int4] = []

        def part(name: str) -> Tensor:
            if not made:
                weight = edit.constant(site.weight).detach()
                made.append(quantize_groups(hadamard.reference(weight) if self.hadamard else weight, self.group))
            return getattr(made[0], name)

        names = Int4._fields if self.activation_bits != 16 else Int4._fields[:-1]
        stored = [edit.buffer(f"{prefix}.{name}", lambda name=name: part(name)) for name in names]
        if self.activation_bits == 16:
            target, options = torch.ops.graphwright.int4_weight_linear.default, ()
        else:
            target = torch.ops.graphwright.int4_linear.default
            options = (self.activation_bits, self.clip, self.hadamard)
        edit.replace(site.node, edit.call(target, site.input, *stored, site.bias, *options, like=site.node))
