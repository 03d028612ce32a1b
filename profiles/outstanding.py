"""Outstanding-sparse: Amber Pruner and W8A8 together, over channels that were made wider first.

1. Channels are scaled, exactly, by folding into what makes them and what reads them (`passes/widen_channels.py`):

       s[j] = max|x[:, j]|^alpha / max|W[:, j]|^(1 - alpha),     x' = x s,  W' = W / s        alpha = 0.10 (paper)

   SmoothQuant divides by this s; the paper multiplies by it: large channels get larger still, so that magnitudes tell
   channels apart. What reads one activation shares its scale.
2. Inputs become n:m sparse where Amber Pruner would have them, ranked on x' and W'.
3. Linears multiply in int8, dynamic W8A8, in all phases; those whose own output int8 changes most stay as they are. It
   is the sensitivity test of sparsity (`sparsity_sensitivity.py`), with another variant.

With plain norms the scale changes no rank, since |x'_j| ||W'_j|| = |x_j| ||W_j||; it matters for magnitudes alone, for
robust norms a little, and for the rounding.

Source: Outstanding-sparse in Amber Pruner, arXiv:2508.02128. Which projections the authors left unquantized, whether
factors come from W or W', and the granularity of the quantizer are not stated; they are options here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from ..kernels.channel_factors import channel_factors
from ..kernels.int8_linear import int8_linear, quantize_per_channel
from ..passes.copy_exported import copy_exported
from ..passes.decision import Decision
from ..passes.rewrite import apply_decisions
from ..passes.widen_channels import linear_factor, norm_readers
from ..patterns.find import find_sites
from ..patterns.graph import GraphView, Refusal
from ..patterns.linear import LinearSite
from ..patterns.norm import NormSite
from .amber import AmberPruner, Choice, arithmetic, prefill_of, weights_of
from .linear_method import Roles
from .measure import channel_maxima
from .method import Context
from .sparsity_sensitivity import own_errors


class OutstandingSparse(AmberPruner):
    """Widen channels, then n:m sparse activations and W8A8."""

    name: ClassVar[str] = "outstanding"
    reference: ClassVar[str] = "Outstanding-sparse: arXiv 2508.02128 (AAAI 2026)"
    rewrites: ClassVar[str] = "linears: W8A8, in prefill with n:m sparse activations"

    alpha: float = Field(0.10, ge=0, le=1, description="Share of a channel's size that the activation gives (paper).")
    direction: Literal["widen", "smooth", "none"] = Field(
        "widen", description="Which way channels are scaled: the paper's, SmoothQuant's, or not at all."
    )
    factors_from: Literal["scaled", "original"] = Field(
        "scaled", description="The weight whose columns rank channels: as it is multiplied, or as it was."
    )
    int8_error: float = Field(
        0.02, ge=0, description="Largest relative error that int8 may cause at a linear's own output."
    )
    int8_roles: Roles = Field(
        ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"), description="Roles to quantize."
    )

    def decide(self, context: Context) -> list[Decision]:
        """Scales, sparse sites and int8 sites.

        Raises:
            InvalidArgument: As `AmberPruner`.
        """
        phase = prefill_of(context)
        widened = self._widen(context, phase)
        exported = copy_exported(context.phases[phase])
        apply_decisions(exported, phase, widened, dict(context.tensors)).commit()
        sites = find_sites(GraphView(exported), phase, ("linear",))
        scaled = replace(context, phases={**context.phases, phase: exported}, sites={**context.sites, phase: sites})
        chosen = self.choose(scaled, phase)
        errors = self._int8_errors(scaled, phase, sites.linear)
        if self.factors_from == "original":
            self._keep_factors(context, phase, chosen)
        record = chosen.record(self)
        record["int8"] = dict(errors)
        context.measured[self.name] = record
        return [
            *widened,
            *(
                self._settled(site, chosen, errors, total)
                for found in context.sites.values()
                for total in (arithmetic(found.linear),)
                for site in found.linear
            ),
        ]

    def _settled(self, site: LinearSite, chosen: Choice, errors: Mapping[str, float], total: int) -> Decision:
        """What becomes of one linear in one phase."""
        sparse = site.id.split("/", 1)[0] == chosen.phase and not chosen.reasons.get(site.place, "not there")
        error = errors.get(site.place)
        whole = error is not None and error <= self.int8_error
        facts, figures = site.describe(), chosen.figures(site)
        if error is not None:
            figures["int8 error"] = error
        if error is None:
            reason = f"role {site.role} is not quantized"
        else:
            reason = "" if whole else f"int8 changes its output by {error:.3f}, more than {self.int8_error:g}"
        options: dict[str, Any] = {}
        if sparse:
            options = self.options(site)
            if self.factors_from == "original" and self.scoring != "none":
                options["factors"] = f"{_tensor_name(site.place)}.factors"
        name = {(True, True): "sparsify_quantize_linear", (True, False): "sparsify_activations"}
        return Decision(
            site=site.id,
            method=self.name,
            pass_name=name.get((sparse, whole), "quantize_linear"),
            options=options,
            status="proposed" if sparse or whole else "refused",
            reason="" if sparse or whole else reason,
            facts=facts,
            figures=figures,
            predicted_gain=0.0 if site.role == "head" else weights_of(site) / (total or 1),
        )

    def _widen(self, context: Context, phase: str) -> list[Decision]:
        """Scales for what will be sparse, as decisions for every phase; the tensors go to the context."""
        if self.direction == "none":
            return []
        exported, sites = context.phases[phase], context.sites[phase]
        view = GraphView(exported)
        by_node = {site.node: site for site in sites.linear}
        targets: dict[Node, list[LinearSite]] = {}
        owners: dict[str, tuple[str, str]] = {}
        for norm in sites.norm:
            readers = norm_readers(view, norm)
            if isinstance(readers, Refusal) or not any(self._is_sparse(by_node.get(reader)) for reader in readers):
                continue
            targets[norm.node] = [by_node[reader] for reader in readers if reader in by_node]
            owners[norm.place] = ("widen_norm", _tensor_name(norm.place))
        for site in sites.linear:
            if self._is_sparse(site) and not isinstance(linear_factor(view, site), Refusal):
                targets[site.input] = [site]
                owners[site.place] = ("widen_up", _tensor_name(site.place))
        maxima = channel_maxima(exported, targets, context.calibration[phase])
        places = [*(norm for norm in sites.norm if norm.place in owners), *sites.linear]
        for owner in places:
            if owner.place not in owners:
                continue
            node = owner.node if isinstance(owner, NormSite) else owner.input
            columns = torch.stack([_columns(view, site) for site in targets[node]]).amax(0)
            scale = scale_of(maxima[node], columns, self.alpha)
            context.tensors[f"{owners[owner.place][1]}.scale"] = scale if self.direction == "widen" else 1 / scale
        return [
            Decision(
                site=owner.id,
                method=self.name,
                pass_name=owners[owner.place][0],
                options={"scale": f"{owners[owner.place][1]}.scale"},
                reason="",
                facts=owner.describe(),
                predicted_gain=0.0,
            )
            for found in context.sites.values()
            for owner in (*found.norm, *found.linear)
            if owner.place in owners
        ]

    def _is_sparse(self, site: LinearSite | None) -> bool:
        return site is not None and not self._declined(site)

    def _int8_errors(self, context: Context, phase: str, sites: Sequence[LinearSite]) -> dict[str, float]:
        """What int8 alone does to each linear's output, of the roles that may be quantized."""
        wanted = [site for site in sites if site.role in self.int8_roles]

        def quantized(site: LinearSite, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
            values, scale = quantize_per_channel(weight)
            return lambda x: int8_linear(x, values, scale, bias)

        with context.progress.stage("sensitivity to int8", len(wanted)):
            return own_errors(
                context.phases[phase], context.calibration[phase], wanted, quantized, context.progress.step
            )

    def _keep_factors(self, context: Context, phase: str, chosen: Choice) -> None:
        view = GraphView(context.phases[phase])
        for site in context.sites[phase].linear:
            if not chosen.reasons.get(site.place, "not there"):
                weight = view.tensor(site.weight)
                assert weight is not None
                factors = channel_factors(weight, self.scoring)
                if factors is not None:
                    context.tensors[f"{_tensor_name(site.place)}.factors"] = factors


def scale_of(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The widening scale [K] of channel maxima of an activation and of the columns that read it.

    Divided by its geometric mean, which changes neither ranks nor steps and keeps half types from overflowing; 1 where
    a channel is dead.
    """
    alive = (activation > 0) & (weight > 0) & activation.isfinite()
    logs = alpha * activation.clamp_min(1e-30).log() - (1 - alpha) * weight.clamp_min(1e-30).log()
    if not alive.any():
        return torch.ones_like(logs)
    return torch.where(alive, (logs - logs[alive].mean()).clamp(-8, 8).exp(), 1.0)


def _tensor_name(place: str) -> str:
    """A place as the name of a buffer: letters, digits, underscores and dots."""
    return "outstanding." + re.sub(r"[^\w.]+", "_", place).strip("_")


def _columns(view: GraphView, site: LinearSite) -> Tensor:
    weight = view.tensor(site.weight)
    assert weight is not None
    return weight.detach().float().abs().amax(0)
