"""Rotate what one linear reads by a Hadamard matrix, and its weight against it (R4 of the papers).

    x ── linear(W) ── y        becomes        x ── hadamard ── linear(W H) ── y

For the input of a down projection, where a product of gate and up lies before the linear and nothing can be folded into
it. Exact; of use before a quantizer, which `quantize_linear_int4` fuses with it.

Source: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), section 3.2; R4 of SpinQuant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..kernels import hadamard
from ..patterns.flow import LINEAR
from ..patterns.linear import LinearSite
from .base import SitePass
from .edit import Edit


@dataclass(frozen=True)
class RotateInput(SitePass[LinearSite]):
    """An online Hadamard transform before one linear."""

    name: ClassVar[str] = "rotate_input"
    exact: ClassVar[bool] = True

    def guard(self, site: LinearSite, edit: Edit) -> str | None:
        """The contract of `graphwright::hadamard`."""
        return hadamard.CONTRACT.check(x=site.input.meta["val"])

    def rewrite(self, site: LinearSite, edit: Edit) -> None:
        """Insert the transform."""
        weight = edit.constant(site.weight).detach()
        made = edit.buffer(f"{site.weight_name}.hadamard", lambda: hadamard.reference(weight.double()).to(weight.dtype))
        source = edit.call(torch.ops.graphwright.hadamard.default, site.input, like=site.node)
        extra = [site.bias] if site.bias is not None else []
        edit.replace(site.node, edit.call(LINEAR, source, made, *extra, like=site.node))
