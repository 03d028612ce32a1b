"""Keep n of every m channels of what one linear reads.

    x ── linear(W, b) ── y      becomes      x ── graphwright.nm_sparsify(f) ── linear(W, b) ── y

The factors f come from the weight's columns and rank channels; they are not multiplied to x. Other readers of x (key
and value beside query, up beside gate) go on reading the dense x.

Where CUDA multiplies 2:4, the product can run on PyTorch's semi-structured kernels:

    x ── graphwright.nm_linear(f, W, b) ── y                                        kernel = "semi_structured"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..kernels import nm_linear, nm_sparsify
from ..kernels.channel_factors import SCORINGS, channel_factors
from ..kernels.contract import Spec
from ..patterns.flow import LINEAR
from ..patterns.linear import LinearSite
from .base import SitePass
from .edit import Edit

KERNELS = ("mask", "semi_structured")


@dataclass(frozen=True)
class Selection:
    """Which channels of a linear's input are kept.

    Attributes:
        n, m: Channels kept of each block.
        scoring: What ranks them beside their magnitude, see `kernels/channel_factors.py`.
        factors: Name of the profile's tensor [K] that ranks them; "" computes it from the weight.
    """

    n: int = 8
    m: int = 16
    scoring: str = "robust_norm"
    factors: str = ""

    def refuse(self, site: LinearSite, edit: Edit) -> str | None:
        """Why a site has no factors, or None."""
        if self.scoring not in SCORINGS:
            return f"got scoring {self.scoring!r}, expected {' or '.join(SCORINGS)}"
        if not self.factors:
            return None
        stored, wanted = edit.shared.get(self.factors), (site.in_features,)
        if stored is not None and tuple(stored.shape) == wanted and stored.dtype is torch.float32:
            return None
        found = "nothing" if stored is None else f"{stored.dtype}{list(stored.shape)}"
        return f"{self.factors} is {found}, expected torch.float32{list(wanted)}"

    def ranks(self, site: LinearSite, edit: Edit) -> Node | None:
        """The stored factors of a site, None where magnitudes alone rank."""
        if self.scoring == "none" and not self.factors:
            return None

        def made() -> torch.Tensor:
            factors = channel_factors(edit.constant(site.weight), self.scoring)
            assert factors is not None
            return factors

        return edit.buffer(self.factors or f"{site.weight_name}.{self.scoring}", made)


@dataclass(frozen=True)
class SparsifyActivations(SitePass[LinearSite], Selection):
    """n:m sparsity of a linear's input, by a `Selection`.

    Attributes:
        kernel: "mask" multiplies the zeros too; "semi_structured" is for 2:4 on CUDA.
    """

    name: ClassVar[str] = "sparsify_activations"

    kernel: str = "mask"

    def guard(self, site: LinearSite, edit: Edit) -> str | None:
        """The operator's contract, a weight that can be ranked by, and a device for the kernel."""
        reason = self.refuse(site, edit)
        if reason is None and self.kernel not in KERNELS:
            reason = f"got kernel {self.kernel!r}, expected {' or '.join(KERNELS)}"
        if reason is not None:
            return reason
        x = site.input.meta["val"]
        if self.kernel == "semi_structured":
            reason = nm_linear.semi_structured_reason(x, site.weight.meta["val"], self.n, self.m)
        return reason or pattern_guard(x, self.n, self.m)

    def rewrite(self, site: LinearSite, edit: Edit) -> None:
        """Insert the selection before the linear, or put both into one operator."""
        ranks = self.ranks(site, edit)
        if self.kernel == "semi_structured":
            fused = torch.ops.graphwright.nm_linear.default
            output = edit.call(fused, site.input, ranks, site.weight, site.bias, self.n, self.m, like=site.node)
        else:
            kept = edit.call(
                torch.ops.graphwright.nm_sparsify.default, site.input, ranks, self.n, self.m, like=site.node
            )
            rest = [] if site.bias is None else [site.bias]
            output = edit.call(LINEAR, kept, site.weight, *rest, like=site.node)
        edit.replace(site.node, output)


def pattern_guard(x: torch.Tensor, n: int, m: int) -> str | None:
    """Why n:m cannot be selected of an activation, or None."""
    reason = nm_sparsify.CONTRACT.check(x=x, factors=Spec((x.shape[-1],), torch.float32), n=n, m=m)
    return reason or nm_sparsify.pattern_reason(n, m)
