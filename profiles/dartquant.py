"""DartQuant: 4-bit linears behind calibrated rotations.

1. Norms are folded into their readers and the residual stream is rotated by R1, values by one R2 a head, both folded
   into weights (`passes/rotate.py`, `passes/rotate_heads.py`): exact. Where keys are quantized, queries and keys get a
   Hadamard matrix as the program runs (R3), and so does what the down projections read (R4).
2. R1 and R2 are fitted to activations that one run of the program gives, each by itself, with the Whip loss
   (`profiles/whip.py`): nothing is ever propagated back through the model.
3. Weights are rounded by GPTQ, layer by layer, each on what the rounded layers before it give (`profiles/gptq.py`).

The published method rotates everywhere. Here each rotation has to earn its place (`rotate="auto"`): it is kept where
the linears that read it, rounded to nearest, err less with it than without.

Source: DartQuant, arXiv:2511.04063, and its code, whose defaults these are: 100 steps at 1e-3, clip ratio 0.9, damping
0.1. For a width of 576 that learning rate is too low; 1e-2 fits better (docs/dartquant.md). One difference: what the
output projection of attention reads is rounded per token, not per head, so that one integer product does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from ..errors import InvalidArgument
from ..kernels import hadamard
from ..kernels.int4_weights import GROUPS, Int4, group_reason
from ..passes.copy_exported import copy_exported
from ..passes.decision import Decision
from ..passes.rewrite import apply_decisions
from ..patterns.find import find_sites
from ..patterns.graph import GraphView
from ..patterns.linear import LinearSite
from .activation_samples import FEWEST, Precision, tokens_of
from .fit_rotations import Rotations, tensor_name
from .linear_method import DECODER_ROLES, LinearMethod, Roles, known_roles
from .method import Context
from .round_layers import Rounding, round_layers
from .whip import Schedule, fit_rotation, random_hadamard

Bits = Literal[4, 8, 16]


class DartQuant(LinearMethod):
    """Rotate, then quantize linears to 4 bits."""

    name: ClassVar[str] = "dartquant"
    reference: ClassVar[str] = "DartQuant, arXiv 2511.04063 (NeurIPS 2025)"
    rewrites: ClassVar[str] = "residual stream, linears, cache: calibrated rotations, W4A4 to W4A16"

    weight_bits: Bits = Field(4, description="Bits of weights; 16 leaves linears as they are.")
    activation_bits: Bits = Field(4, description="Bits of the linears' inputs; 16 quantizes weights only.")
    kv_bits: Bits = Field(16, description="Bits of keys and values; below 16 they are rounded, and stored as before.")
    bits: Annotated[dict[str, tuple[Bits, Bits]], AfterValidator(known_roles)] = Field(
        {}, description="Role to (weight bits, activation bits), over the above."
    )
    group: int | None = Field(None, description="Input channels that share a step; None: 128, or 64 or 32 to divide.")
    weights: Literal["gptq", "gptaq", "rtn"] = Field(
        "gptq", description="How weights are rounded: GPTQ, GPTAQ (makes up for earlier layers), or to nearest."
    )
    damp: float | None = Field(
        None,
        gt=0,
        description="GPTQ: share of the mean diagonal that is added; None: 0.1 behind a rotation, else 0.01.",
    )
    clip: float | None = Field(
        None, gt=0, le=1, description="Share of a token's range that is kept; None: 0.9 at 4 bits (published), 1 at 8."
    )
    slow: Literal["int8", "float"] = Field(
        "int8",
        description="What a linear of 4 bits becomes where it is measured slower and keep='faster' is asked for.",
    )
    rotate: Literal["auto", "always", "never"] = Field("auto", description="Rotate where it was measured to help.")
    steps: int = Field(100, ge=0, description="Updates of R1; 0 keeps every rotation at its random Hadamard start.")
    head_steps: int = Field(10, ge=0, description="Updates of each R2 (published: 5 to 10, one an epoch).")
    lr: float = Field(1e-3, gt=0, description="Learning rate of the rotations (published); 1e-2 for small widths.")
    lr_schedule: Schedule = Field("constant", description="Of the learning rate; cosine lets it fall to zero.")
    batch: int = Field(2048, ge=1, description="Tokens of an update.")
    samples: int = Field(65536, ge=FEWEST, description="Rows that R1 is fitted to, over all layers.")
    seed: int = Field(0, description="Of signs, sampled rows and batches.")
    roles: Roles = Field(DECODER_ROLES, description="Roles to quantize.")

    def decide(self, context: Context) -> list[Decision]:
        """Fit rotations, choose among them, round weights, and say so for every phase.

        Raises:
            InvalidArgument: No linear has a floating-point weight, or calibration is needed and too short, or its
                activations hold NaN.
        """
        phase = _widest(context)
        if not context.sites[phase].linear:
            raise InvalidArgument("no linear of this program has a floating-point weight; it may be quantized already")
        plans = {site.place: self._plan(site) for site in context.sites[phase].linear}
        wanted = {place: plan for place, plan in plans.items() if isinstance(plan, Precision)}
        inputs = context.calibration.get(phase, [])
        if wanted and (self.rotate != "never" or self.weights != "rtn") and tokens_of(inputs) < FEWEST:
            raise InvalidArgument(
                f"dartquant needs at least {FEWEST} tokens of calibration, got {tokens_of(inputs)}; pass calibration=, "
                "or rotate='never' and weights='rtn', which need none"
            )
        rotations = Rotations(self, context, phase, wanted)
        rounded = self._round(context, phase, inputs, rotations, wanted)
        return [*rotations.decisions, *self._linears(context, plans, rotations.online, rounded), *self._caches(context)]

    def instead(self, decision: Decision) -> Decision | None:
        """An int8 linear, rotated by what is folded into weights only: R4 is part of the 4-bit operator."""
        if self.slow != "int8" or decision.pass_name != "quantize_linear_int4":
            return None
        facts = {name: fact for name, fact in decision.facts.items() if name != "online rotation"}
        facts["precision"] = f"W8A8, since {facts['precision']} was measured slower"
        return decision.model_copy(update={"pass_name": "quantize_linear", "options": {}, "facts": facts})

    def _plan(self, site: LinearSite) -> Precision | str:
        """How a linear is to run, or why it is left as it is."""
        if reason := self.left_out(site, self.roles):
            return reason
        weight_bits, activation_bits = self.bits.get(site.role, (self.weight_bits, self.activation_bits))
        if weight_bits == 16:
            return "16 bits are asked for"
        if weight_bits == 8 and activation_bits != 8:
            return f"there is no operator for W8A{activation_bits}"
        group = self.group or next((g for g in (128, 64, 32) if site.in_features % g == 0), GROUPS[0])
        if weight_bits == 4 and (reason := group_reason(site.in_features, group)) is not None:
            return reason
        clip = self.clip if self.clip is not None else (0.9 if activation_bits == 4 else 1.0)
        return Precision(weight_bits, activation_bits, group, clip)

    def _round(
        self,
        context: Context,
        phase: str,
        inputs: Sequence[list[Any]],
        rotations: Rotations,
        wanted: Mapping[str, Precision],
    ) -> dict[str, str]:
        """Round weights of 4 bits on the rotated program; place -> prefix of the tensors in the profile."""
        if self.weights == "rtn" or all(plan.weight_bits != 4 for plan in wanted.values()):
            return {}
        exported = copy_exported(context.phases[phase])
        apply_decisions(exported, phase, rotations.decisions, dict(context.tensors)).commit()
        linears = {}
        for site in find_sites(GraphView(exported), phase, ("linear",)).linear:
            plan, rotated = wanted.get(site.place), rotations.online.get(site.place, False)
            if plan is not None and plan.weight_bits == 4:
                # Outlier channels make the mean diagonal large: 0.1 of it, the published share, leaves nothing to be
                # learned for the others where they have not been spread.
                spread = rotated or site.place in rotations.flat
                damp = self.damp if self.damp is not None else (0.1 if spread else 0.01)
                linears[site] = Rounding(plan, rotated, damp)
        with context.progress.stage("round weights", len(linears)):
            original = self.weights == "gptaq"
            made = round_layers(exported, inputs, linears, original=original, on_layer=context.progress.step)
        names = {place: tensor_name(place) for place in made}
        for place, weight in made.items():
            context.tensors.update({f"{names[place]}.{part}": getattr(weight, part) for part in Int4._fields})
        return names

    def _linears(
        self,
        context: Context,
        plans: Mapping[str, Precision | str],
        online: Mapping[str, bool],
        rounded: Mapping[str, str],
    ) -> list[Decision]:
        decisions = []
        for sites in context.sites.values():
            total = sum(site.in_features * site.out_features for site in sites.linear) or 1
            for site in sites.linear:
                plan = plans.get(site.place, "the phase that was calibrated has no such site")
                reason = plan if isinstance(plan, str) else ""
                options: dict[str, Any] = {}
                if isinstance(plan, Precision) and plan.weight_bits == 4:
                    options = {"group": plan.group, "activation_bits": plan.activation_bits, "clip": plan.clip}
                    if online.get(site.place):
                        options["hadamard"] = True
                    if site.place in rounded:
                        options["weight"] = rounded[site.place]
                eight = isinstance(plan, Precision) and plan.weight_bits == 8
                facts = site.describe()
                if isinstance(plan, Precision):
                    facts["precision"] = f"W{plan.weight_bits}A{plan.activation_bits}"
                    if online.get(site.place):
                        facts["online rotation"] = str(hadamard.orders(site.in_features))
                decisions.append(
                    Decision(
                        site=site.id,
                        method=self.name,
                        pass_name="quantize_linear" if eight else "quantize_linear_int4",
                        options=options,
                        status="refused" if reason else "proposed",
                        reason=reason,
                        facts=facts,
                        predicted_gain=site.in_features * site.out_features / total,
                    )
                )
        return decisions

    def _caches(self, context: Context) -> list[Decision]:
        if self.kv_bits == 16:
            return []
        return [
            Decision(
                site=site.id,
                method=self.name,
                pass_name="fake_quantize_cache",
                options={"key_bits": self.kv_bits, "value_bits": self.kv_bits, "group": site.head_dim},
                reason="",
                facts=site.describe(),
                predicted_gain=0.0,
            )
            for sites in context.sites.values()
            for site in sites.cache
        ]

    def fit_stream(self, tokens: Tensor, generator: torch.Generator, on_step: Callable[[], None]) -> Tensor:
        """R1 for sampled rows [T, n] of a stream's norms."""
        start = random_hadamard(tokens.shape[-1], generator)
        return self._fit(tokens, start, self.steps, generator, on_step)

    def fit_heads(self, tokens: Tensor, generator: torch.Generator, on_step: Callable[[], None]) -> Tensor:
        """R2 for sampled rows [kv_heads, T, e] of an attention's output; all heads start alike."""
        start = random_hadamard(tokens.shape[-1], generator).expand(len(tokens), -1, -1)
        return self._fit(tokens, start, min(self.head_steps, self.steps), generator, on_step)

    def _fit(
        self, tokens: Tensor, start: Tensor, steps: int, generator: torch.Generator, on_step: Callable[[], None]
    ) -> Tensor:
        return fit_rotation(
            tokens,
            start,
            steps=steps,
            lr=self.lr,
            schedule=self.lr_schedule,
            batch=self.batch,
            generator=generator,
            on_step=on_step,
        )


def _widest(context: Context) -> str:
    """The phase that sees most values at once."""
    counts = {name: tokens_of(context.calibration.get(name, [])) for name in context.sites}
    return max(counts, key=lambda name: counts[name])
