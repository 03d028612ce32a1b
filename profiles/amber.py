"""Amber Pruner: n:m sparsity of activations in prefill, on dense weights.

1. Channels are ranked by |x| times a factor of the weight's column (`kernels/channel_factors.py`); n of every m stay.
2. Down projections are always sparse. Query and gate are sparse together, but for the layers where they suffer most;
   key, value, output and up never are (published policy).
3. How much a layer suffers is measured on calibration: at the program's output, or at the projections' own
   (`sparsity_sensitivity.py`). As many layers are skipped as leave the asked share of linear arithmetic sparse.

Decode stays dense, on the same weights.

What this saves is arithmetic. Only 2:4 has hardware that skips zeros (NVIDIA's sparse tensor cores, 16-bit types). On
CPUs, and for 4:8 and 8:16 everywhere, the zeros are multiplied like other numbers and the selection costs time on top.
So such sites are slower than dense ones, and `optimize(keep="faster")` refuses them all: ask with `keep="smaller"`.

Source: Amber Pruner, arXiv:2508.02128 (AAAI 2026), no code released; what its text leaves open was inferred and is
marked so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from ..errors import InvalidArgument
from ..kernels import nm_linear
from ..kernels.channel_factors import Scoring, channel_factors
from ..kernels.nm_sparsify import nm_sparsify, pattern_reason
from ..passes.decision import Decision
from ..patterns.linear import LinearSite
from .activation_samples import tokens_of
from .linear_method import LinearMethod, Roles
from .measure import measure_sites, output_errors
from .method import Context
from .sparsity_sensitivity import own_errors

FEWEST = 2
"""Tokens that calibration must have: one token is a decode step, which stays dense."""
PREFILL = "prefill"


class AmberPruner(LinearMethod):
    """Make the inputs of some linears n:m sparse in prefill."""

    name: ClassVar[str] = "amber"
    reference: ClassVar[str] = "Amber Pruner, arXiv 2508.02128 (AAAI 2026)"
    rewrites: ClassVar[str] = "linears in prefill: n:m sparse activations, dense weights"

    pattern: tuple[int, int] = Field((8, 16), description="Channels kept, of so many: 2:4, 4:8, 8:16, 16:32.")
    scoring: Scoring = Field(
        "robust_norm",
        description="Ranks channels beside their magnitude: robust_norm drops the weight's outliers, robust_all lets"
        " them count, norm is the plain norm of columns, none is magnitude alone.",
    )
    coverage: float = Field(0.55, ge=0, le=1, description="Least share of linear arithmetic that skipping leaves.")
    always: Roles = Field(("down",), description="Roles that are sparse in every layer.")
    selectively: Roles = Field(("q", "gate"), description="Roles that are skipped in sensitive layers.")
    sensitivity: Literal["output", "site"] = Field(
        "output",
        description="Skip by the error of the program's output with one site sparse at a time, or by that of the site's"
        " own output, which takes one run instead of one a site.",
    )

    @field_validator("pattern")
    @classmethod
    def _a_pattern(cls, pattern: tuple[int, int]) -> tuple[int, int]:
        if (reason := pattern_reason(*pattern)) is not None:
            raise ValueError(reason)
        return pattern

    def decide(self, context: Context) -> list[Decision]:
        """Choose the sparse sites of the prefill; the others are refused with the reason.

        Raises:
            InvalidArgument: The prefill has no linear, or calibration has fewer than two tokens, or gives NaN.
        """
        phase = prefill_of(context)
        chosen = self.choose(context, phase)
        context.measured[self.name] = chosen.record(self)
        return [
            self._decision(site, chosen, total)
            for name, sites in context.sites.items()
            for total in (arithmetic(sites.linear),)
            for site in sites.linear
        ]

    def choose(self, context: Context, phase: str) -> Choice:
        """Which sites are sparse, and why the others are not."""
        sites = context.sites[phase].linear
        if not sites:
            raise InvalidArgument(f"{self.name}: no linear of this program has a floating-point weight")
        inputs = context.calibration.get(phase, [])
        if tokens_of(inputs) < FEWEST:
            raise InvalidArgument(
                f"{self.name} needs at least {FEWEST} tokens of calibration, got {tokens_of(inputs)}; pass calibration="
            )
        layers = layers_of(sites)
        reasons = {site.place: self._declined(site) for site in sites}
        errors = self._errors(context, phase, [site for site in sites if not reasons[site.place]])
        skipped = self._skipped(sites, layers, reasons, errors)
        for site in sites:
            if not reasons[site.place] and site.role in self.selectively and layers[site.place] in skipped:
                reasons[site.place] = f"layer {layers[site.place]} is among the {len(skipped)} most sensitive"
        kernels = self._kernels(context, phase, [site for site in sites if not reasons[site.place]])
        return Choice(phase, reasons, errors, skipped, kernels, arithmetic(sites), tuple(sites))

    def options(self, site: LinearSite, kernel: str = "mask") -> dict[str, Any]:
        """Options of the pass for a site."""
        n, m = self.pattern
        return {"n": n, "m": m, "scoring": self.scoring} | ({} if kernel == "mask" else {"kernel": kernel})

    def sparse(self, site: LinearSite, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What a site gives once its input is sparse."""
        factors = channel_factors(weight, self.scoring)
        return lambda x: functional.linear(nm_sparsify(x, factors, *self.pattern), weight, bias)

    def _errors(self, context: Context, phase: str, sites: Sequence[LinearSite]) -> dict[str, float]:
        exported, inputs = context.phases[phase], context.calibration[phase]
        with context.progress.stage("sensitivity to sparse inputs", len(sites)):
            if self.sensitivity == "site":
                return own_errors(exported, inputs, sites, self.sparse, context.progress.step)
            tried = [
                Decision(
                    site=s.id, method=self.name, pass_name="sparsify_activations", options=self.options(s), reason=""
                )
                for s in sites
                if s.role in self.selectively
            ]
            shared = dict(context.tensors)
            found = output_errors(exported, phase, tried, inputs[:1], shared, context.progress.step)
            return {site.place: found[site.id] for site in sites if site.id in found}

    def _skipped(
        self,
        sites: Sequence[LinearSite],
        layers: Mapping[str, int],
        reasons: Mapping[str, str],
        errors: Mapping[str, float],
    ) -> tuple[int, ...]:
        """The most sensitive layers, as many as leave `coverage`."""
        candidates: dict[int, list[LinearSite]] = {}
        for site in sites:
            if not reasons[site.place] and site.role in self.selectively:
                candidates.setdefault(layers[site.place], []).append(site)
        order = sorted(candidates, key=lambda layer: -sum(errors.get(site.place, 0.0) for site in candidates[layer]))
        total = arithmetic(sites) or 1
        sparse = sum(weights_of(site) for site in sites if not reasons[site.place])
        skipped = []
        for layer in order:
            sparse -= sum(weights_of(site) for site in candidates[layer])
            if sparse / total < self.coverage:
                break
            skipped.append(layer)
        return tuple(skipped)

    def _declined(self, site: LinearSite) -> str:
        if reason := self.left_out(site, (*self.always, *self.selectively)):
            return reason
        if site.in_features % self.pattern[1]:
            return f"blocks of {self.pattern[1]} do not divide {site.in_features} channels"
        return ""

    def _kernels(self, context: Context, phase: str, sites: Sequence[LinearSite]) -> dict[str, str]:
        """Places whose 2:4 product is faster on sparse tensor cores than dense, measured here and now."""
        able = [
            site
            for site in sites
            if nm_linear.semi_structured_reason(site.input.meta["val"], site.weight.meta["val"], *self.pattern) is None
        ]
        if not able:
            return {}
        tried = [
            Decision(
                site=site.id,
                method=self.name,
                pass_name="sparsify_activations",
                options=self.options(site, "semi_structured"),
                reason="",
            )
            for site in able
        ]
        inputs = context.calibration[phase][:1]
        measured, _ = measure_sites(context.phases[phase], phase, tried, inputs, dict(context.tensors), {})
        faster = {site_id for site_id, measure in measured.items() if measure.gain > 1}
        return {site.place: "semi_structured" for site in able if site.id in faster}

    def _decision(self, site: LinearSite, chosen: Choice, total: int) -> Decision:
        reason = chosen.reasons.get(site.place, f"the phase {chosen.phase} has no such site")
        if not reason and site.id.split("/", 1)[0] != chosen.phase:
            reason = "dense outside the prefill, on the same weights"
        return Decision(
            site=site.id,
            method=self.name,
            pass_name="sparsify_activations",
            options={} if reason else self.options(site, chosen.kernels.get(site.place, "mask")),
            status="refused" if reason else "proposed",
            reason=reason,
            facts=site.describe(),
            figures=chosen.figures(site),
            predicted_gain=0.0 if site.role == "head" else weights_of(site) / (total or 1),
        )


class Choice(NamedTuple):
    """The sparse sites of a prefill.

    Attributes:
        phase: The prefill's name.
        reasons: Place -> why it stays dense, "" where it is sparse.
        errors: Place -> sensitivity, of the sites that may be sparse.
        skipped: Layers whose selective roles are dense, most sensitive first.
        kernels: Place -> kernel, where it is not the mask.
        total: Multiply-adds of a token in all linears but heads.
        sites: The prefill's linears.
    """

    phase: str
    reasons: dict[str, str]
    errors: dict[str, float]
    skipped: tuple[int, ...]
    kernels: dict[str, str]
    total: int
    sites: tuple[LinearSite, ...]

    def figures(self, site: LinearSite) -> dict[str, Any]:
        """What the report reads of a site."""
        found: dict[str, Any] = {} if site.role == "head" else {"multiply-adds": weights_of(site)}
        return found | ({"sensitivity": self.errors[site.place]} if site.place in self.errors else {})

    @property
    def coverage(self) -> float:
        """Share of the linears' multiply-adds that is sparse."""
        return sum(weights_of(site) for site in self.sites if not self.reasons[site.place]) / (self.total or 1)

    def record(self, method: AmberPruner) -> dict[str, Any]:
        """Plain data for the profile."""
        return {
            "pattern": list(method.pattern),
            "coverage": self.coverage,
            "skipped_layers": list(self.skipped),
            "sensitivity": self.errors,
        }


def prefill_of(context: Context) -> str:
    """The phase that is made sparse: the prefill of a language model, else the one that is calibrated on most."""
    if PREFILL in context.sites:
        return PREFILL
    return max(context.sites, key=lambda name: tokens_of(context.calibration.get(name, [])))


def layers_of(sites: Sequence[LinearSite]) -> dict[str, int]:
    """Place -> number of its layer, counted in graph order: each down projection ends one."""
    layers, layer = {}, 0
    for site in sites:
        layers[site.place] = layer
        layer += site.role == "down"
    return layers


def weights_of(site: LinearSite) -> int:
    """Multiply-adds of a token."""
    return site.in_features * site.out_features


def arithmetic(sites: Sequence[LinearSite]) -> int:
    """Multiply-adds of a token in all linears but vocabulary projections, as the paper counts coverage."""
    return sum(weights_of(site) for site in sites if site.role != "head")
