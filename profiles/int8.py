"""Int8: linears in W8A8, dynamic. The plainest method, and the template for the others.

Weights int8 per output channel, activations int8 per token when the program runs, both symmetric. Where a few channels
of an activation are much larger than the rest, one step for the whole token leaves little for the others; so part of
each channel's size is moved into the weight before both are quantized (SmoothQuant, Xiao et al. 2023, equation 4):

    e[j] = round(log2(max|x[:, j]|^alpha / max|W[:, j]|^(1 - alpha)))         per input channel j

Rounding to powers of two keeps the move exact in floating point. Linears that read one activation share its exponents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from ..passes.decision import Decision
from ..patterns.graph import GraphView
from ..patterns.linear import LinearSite
from .linear_method import DECODER_ROLES, LinearMethod, Roles
from .measure import channel_maxima
from .method import Context

_LARGEST_EXPONENT = 14
"""Channels are moved by at most this power of two, so that float16 activations neither vanish nor overflow."""


class Int8(LinearMethod):
    """Replace linears by dynamic int8 ones."""

    name: ClassVar[str] = "int8"
    reference: ClassVar[str] = "SmoothQuant: Xiao et al. 2023, arXiv 2211.10438, equations 1 and 4"
    rewrites: ClassVar[str] = "linears, W8A8 dynamic"

    roles: Roles = Field(
        DECODER_ROLES,
        description="Roles to quantize. The vocabulary projection (`head`) is left out unless it is named here.",
    )
    smooth: float | None = Field(
        0.5, ge=0, le=1, description="Share alpha of a channel's size that moves into the weight; None moves nothing."
    )

    def decide(self, context: Context) -> list[Decision]:
        """Propose every linear whose role is asked for; the gain is its share of the phase's linear arithmetic."""
        exponents = self._exponents(context)
        decisions = []
        for sites in context.sites.values():
            total = sum(_weight(site) for site in sites.linear) or 1
            for site in sites.linear:
                reason = self.left_out(site, self.roles)
                moved = exponents.get(site.place) if not reason else None
                decisions.append(
                    Decision(
                        site=site.id,
                        method=self.name,
                        pass_name="quantize_linear",
                        options={"exponents": moved} if moved else {},
                        status="refused" if reason else "proposed",
                        reason=reason,
                        facts=site.describe(),
                        predicted_gain=_weight(site) / total,
                    )
                )
        return decisions

    def _exponents(self, context: Context) -> dict[str, tuple[int, ...]]:
        """Place -> exponents, from the phase that sees most tokens at once."""
        if self.smooth is None:
            return {}
        counts = {name: _elements(items) for name, items in context.calibration.items() if items}
        if not counts:
            return {}
        phase = max(counts, key=lambda name: counts[name])
        exported, view = context.phases[phase], GraphView(context.phases[phase])
        readers: dict[Node, list[LinearSite]] = {}
        for site in context.sites[phase].linear:
            if not self.left_out(site, self.roles):
                readers.setdefault(site.input, []).append(site)
        maxima = channel_maxima(exported, readers, context.calibration[phase])
        result = {}
        for node, sites in readers.items():
            weights = torch.stack([_columns(view, site) for site in sites]).amax(0)
            moved = _balance(maxima[node], weights, self.smooth)
            if any(moved):
                result |= {site.place: moved for site in sites}
        return result


def _balance(activation: Tensor, weight: Tensor, alpha: float) -> tuple[int, ...]:
    """Exponents for channel maxima [K] of an activation and of the weight's columns; 0 where a channel is dead."""
    alive = (activation > 0) & (weight > 0) & activation.isfinite()
    exponents = alpha * activation.clamp_min(1e-30).log2() - (1 - alpha) * weight.clamp_min(1e-30).log2()
    if not alive.any():
        return ()
    exponents = (exponents - exponents[alive].median()).round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return tuple(int(value) for value in torch.where(alive, exponents, 0.0))


def _columns(view: GraphView, site: LinearSite) -> Tensor:
    weight = view.tensor(site.weight)
    assert weight is not None
    return weight.detach().float().abs().amax(0)


def _elements(items: Sequence[list[Any]]) -> int:
    return sum(value.numel() for flat in items for value in flat if isinstance(value, Tensor))


def _weight(site: LinearSite) -> int:
    return site.in_features * site.out_features
