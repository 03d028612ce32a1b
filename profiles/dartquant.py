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

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.fx import Node

from ..errors import InvalidArgument
from ..kernels import hadamard
from ..kernels.int4_weights import GROUPS, Int4, dequantized, group_reason
from ..passes.decision import Decision
from ..passes.edit import Edit, copy_exported
from ..passes.rewrite import apply_decisions
from ..passes.rotate_heads import RotateHeads
from ..patterns.attention import AttentionSite
from ..patterns.find import find_sites
from ..patterns.graph import GraphView, Refusal, arguments
from ..patterns.linear import LinearSite, Role
from ..patterns.residual import ResidualStream
from ..patterns.value_path import ValuePath, find_value_path, per_head
from .activation_samples import FEWEST, Precision, output_error, sample_rows, tokens_of
from .gptq import gptq
from .method import Context, Method
from .walk import Handler, walk
from .whip import fit_rotation, random_hadamard

Bits = Literal[4, 8, 16]


class DartQuant(Method):
    """Rotate, then quantize linears to 4 bits."""

    name: ClassVar[str] = "dartquant"
    reference: ClassVar[str] = "DartQuant, arXiv 2511.04063 (NeurIPS 2025)"
    rewrites: ClassVar[str] = "residual stream, linears, cache: calibrated rotations, W4A4 to W4A16"

    weight_bits: Bits = Field(4, description="Bits of weights; 16 leaves linears as they are.")
    activation_bits: Bits = Field(4, description="Bits of the linears' inputs; 16 quantizes weights only.")
    kv_bits: Bits = Field(16, description="Bits of keys and values; below 16 they are rounded, and stored as before.")
    bits: dict[str, tuple[Bits, Bits]] = Field(
        {}, description="Role to (weight bits, activation bits), over the above."
    )
    group: int | None = Field(None, description="Input channels that share a step; None: 128, or 64 or 32 to divide.")
    weights: Literal["gptq", "rtn"] = Field("gptq", description="How weights are rounded: GPTQ, or to nearest.")
    damp: float | None = Field(
        None,
        gt=0,
        description="GPTQ: share of the mean diagonal that is added; None: 0.1 behind a rotation, else 0.01.",
    )
    clip: float | None = Field(
        None, gt=0, le=1, description="Share of a token's range that is kept; None: 0.9 at 4 bits (published), 1 at 8."
    )
    rotate: Literal["auto", "always", "never"] = Field("auto", description="Rotate where it was measured to help.")
    steps: int = Field(100, ge=0, description="Updates of R1; 0 keeps every rotation at its random Hadamard start.")
    head_steps: int = Field(10, ge=0, description="Updates of each R2 (published: 5 to 10, one an epoch).")
    lr: float = Field(1e-3, gt=0, description="Learning rate of the rotations (published); 1e-2 for small widths.")
    batch: int = Field(2048, ge=1, description="Tokens of an update.")
    samples: int = Field(65536, ge=FEWEST, description="Rows that R1 is fitted to, over all layers.")
    seed: int = Field(0, description="Of signs, sampled rows and batches.")
    roles: tuple[str, ...] = Field(
        ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "other"), description="Roles to quantize."
    )
    skip: tuple[str, ...] = Field((), description="Module paths, or ends of module paths, to leave as they are.")

    @field_validator("roles", "bits")
    @classmethod
    def _known(cls, roles: Any) -> Any:
        for role in roles:
            if role not in get_args(Role):
                raise ValueError(f"unknown role {role!r}; there are {', '.join(get_args(Role))}")
        return roles

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
        if wanted and (self.rotate != "never" or self.weights == "gptq") and tokens_of(inputs) < FEWEST:
            raise InvalidArgument(
                f"dartquant needs at least {FEWEST} tokens of calibration, got {tokens_of(inputs)}; pass calibration=, "
                "or rotate='never' and weights='rtn', which need none"
            )
        rotations = _Rotations(self, context, phase, wanted)
        exact = rotations.decisions if wanted else []
        rounded = self._round(context, phase, inputs, exact, rotations, wanted)
        return [*exact, *self._linears(context, plans, rotations.online, rounded), *self._caches(context)]

    def _plan(self, site: LinearSite) -> Precision | str:
        """How a linear is to run, or why it is left as it is."""
        path = site.module_path
        if site.role not in self.roles:
            return f"role {site.role} is not asked for"
        for skipped in self.skip:
            if path == skipped or path.endswith(f".{skipped}"):
                return f"skipped by option: {skipped}"
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
        exact: Sequence[Decision],
        rotations: _Rotations,
        wanted: Mapping[str, Precision],
    ) -> dict[str, str]:
        """GPTQ on the rotated program, layer by layer; place -> prefix of the tensors in the profile."""
        four = {place: plan for place, plan in wanted.items() if plan.weight_bits == 4}
        if self.weights == "rtn" or not four:
            return {}
        exported = copy_exported(context.phases[phase])
        apply_decisions(exported, phase, exact, dict(context.tensors)).commit()
        sites = find_sites(GraphView(exported), phase, ("linear",)).linear
        names: dict[str, str] = {}
        known: dict[tuple[Node, bool], Tensor] = {}

        def handler(site: LinearSite) -> Handler:
            plan, rotated = four[site.place], rotations.online.get(site.place, False)
            # Outlier channels make the mean diagonal large: 0.1 of it, the published share, leaves nothing to be
            # learned for the others where they have not been spread.
            flat = rotated or site.place in rotations.flat
            damp = self.damp if self.damp is not None else (0.1 if flat else 0.01)

            def run(calls: list[tuple[Any, ...]]) -> list[Tensor]:
                change: Callable[[Tensor], Tensor] = hadamard.reference if rotated else torch.Tensor.float
                rows = [change(call[0]).reshape(-1, site.in_features) for call in calls]
                key = (site.input, rotated)
                if key not in known:
                    known.clear()  # what reads one activation follows one another
                    known[key] = _hessian(rows, site)
                made = gptq(change(calls[0][1]), known[key], plan.group, damp)
                names[site.place] = _tensor_name(site.place)
                context.tensors.update({f"{names[site.place]}.{part}": getattr(made, part) for part in Int4._fields})
                weight, dtype = dequantized(made), calls[0][0].dtype
                context.progress.step()
                outputs = [
                    (row @ weight.t()).view(*call[0].shape[:-1], -1) for row, call in zip(rows, calls, strict=True)
                ]
                bias = calls[0][2] if len(calls[0]) > 2 else None
                return [(y if bias is None else y + bias.float()).to(dtype) for y in outputs]

            return run

        with context.progress.stage("round weights", len(four)):
            walk(exported, inputs, {site.node: handler(site) for site in sites if site.place in four})
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
            tokens, start, steps=steps, lr=self.lr, batch=self.batch, generator=generator, on_step=on_step
        )


class _Heads(NamedTuple):
    """An attention whose values can be rotated, with the linears around it."""

    site: AttentionSite
    path: ValuePath


class _Rotations:
    """Fits all rotations of a program and keeps those that help.

    Attributes:
        decisions: What to do in every phase, and what was not done and why.
        online: Place of a linear -> whether its input is rotated as it is quantized (R4).
        flat: Places of linears whose input is rotated by what is folded (R1, R2).
    """

    def __init__(self, method: DartQuant, context: Context, phase: str, wanted: Mapping[str, Precision]) -> None:
        self.method, self.context, self.phase, self.wanted = method, context, phase, wanted
        self.decisions: list[Decision] = []
        self.online: dict[str, bool] = {}
        self.flat: set[str] = set()
        if method.rotate == "never" or not wanted:
            return
        self.generator = torch.Generator().manual_seed(method.seed)
        self.view = GraphView(context.phases[phase])
        self.sites = {site.node: site for site in context.sites[phase].linear}
        streams = context.sites[phase].residual
        heads = [self._heads(site) for site in context.sites[phase].attention]
        rotatable = [found for found in heads if found is not None]
        down = [site for site in self.sites.values() if self._is_online(site)]
        linears = [found.path.output for found in rotatable] + [site.node for site in down]
        norms = max(1, sum(len(stream.norms) for stream in streams))
        count = max(FEWEST, -(-method.samples // norms))
        with context.progress.stage("sample activations"):
            inputs = context.calibration[phase]
            self.rows = sample_rows(context.phases[phase], inputs, streams, linears, count, self.generator)
        updates = method.steps * len(streams) + min(method.head_steps, method.steps) * len(rotatable)
        with context.progress.stage("fit rotations", updates):
            for stream in streams:
                self._stream(stream)
            for site, found in zip(context.sites[phase].attention, heads, strict=True):
                self._attention(site, found)
            for site in down:
                self.online[site.place] = self._helps_online(site)

    def _stream(self, stream: ResidualStream) -> None:
        """R1."""
        read = [linear for linear in stream.readers if self._precision(linear) is not None]
        if not read:
            return self._refuse(stream.place, "rotate", "none of the linears that read the stream is quantized")
        tokens = torch.cat([self.rows[norm] for norm, _ in stream.norms])
        rotation = self.method.fit_stream(tokens, self.generator, self.context.progress.step)
        facts = stream.describe()
        if self.method.rotate == "auto":
            before, after = self._reader_errors(stream, rotation)
            facts["error unrotated, rotated"] = f"{before:.4g}, {after:.4g}"
            if after >= before:
                return self._refuse(stream.place, "rotate", "measured no better than unrotated", facts)
        name = f"{_tensor_name(stream.place)}.rotation"
        self.context.tensors[name] = rotation
        self.flat |= {self.sites[linear].place for linear in read}
        self._decide(stream.place, "rotate", {"rotation": name}, facts)
        return None

    def _reader_errors(self, stream: ResidualStream, rotation: Tensor) -> tuple[float, float]:
        """Mean output error of some of the stream's readers without and with R1."""
        before, after, count = 0.0, 0.0, 0
        norms = [pair for pair in stream.norms if any(self._precision(linear) for linear in pair[1])]
        for norm, linears in norms[:: max(1, len(norms) // _JUDGED)]:
            args = arguments(norm)
            gain = 1.0 if args["weight"] is None else self._stored(args["weight"])
            shift = 0.0 if args.get("bias") is None else self._stored(args["bias"])
            for linear in linears:
                precision = self._precision(linear)
                if precision is None:
                    continue
                weight = self._weight(linear)
                # Unrotated, gain and shift stay in the activations.
                before += output_error(self.rows[norm] * gain + shift, weight, precision, lambda x: x)
                after += output_error(self.rows[norm], weight * gain, precision, lambda x: x @ rotation)
                count += 1
        return before / max(count, 1), after / max(count, 1)

    def _heads(self, site: AttentionSite) -> _Heads | None:
        """The attention, if the linear that reads its output is quantized and all phases can rotate its values."""
        path = find_value_path(self.view, site)
        if isinstance(path, Refusal) or self._precision(path.output) is None:
            return None
        return _Heads(site, path)

    def _attention(self, site: AttentionSite, found: _Heads | None) -> None:
        """R2 and R3."""
        options: dict[str, Any] = {}
        facts = site.describe()
        if found is not None:
            path = found.path
            rows = self.rows[path.output].unflatten(-1, (path.kv_heads, -1, path.head_dim))
            tokens = rows.permute(1, 0, 2, 3).flatten(1, 2)
            rotation = self.method.fit_heads(tokens, self.generator, self.context.progress.step)
            name = f"{_tensor_name(site.place)}.values"
            self.context.tensors[name] = rotation
            options["values"] = name
            if self.method.rotate == "auto":
                before, after = self._head_errors(path, rotation)
                facts["error unrotated, rotated"] = f"{before:.4g}, {after:.4g}"
                if after >= before:
                    options.clear()
            if options and self._guarded(site.place, options) is not None:
                options.clear()
            if options:
                self.flat.add(self.sites[path.output].place)
            else:
                del self.context.tensors[name]
        if self.method.kv_bits < 16 and self._guarded(site.place, {"keys": True}) is None:
            options["keys"] = True
        if options:
            self._decide(site.place, "rotate_heads", options, facts)
        else:
            path = find_value_path(self.view, site)
            reason = str(path) if isinstance(path, Refusal) else "measured no better than unrotated, or not quantized"
            self._refuse(site.place, "rotate_heads", reason, facts)

    def _head_errors(self, path: ValuePath, rotation: Tensor) -> tuple[float, float]:
        precision = self._precision(path.output)
        assert precision is not None
        blocks = per_head(rotation, path.heads)

        def rotated(x: Tensor) -> Tensor:
            return torch.einsum("the,hed->thd", x.unflatten(-1, (path.heads, -1)), blocks).flatten(1)

        rows, weight = self.rows[path.output], self._weight(path.output)
        return output_error(rows, weight, precision, lambda x: x), output_error(rows, weight, precision, rotated)

    def _guarded(self, place: str, options: dict[str, Any]) -> str | None:
        """The first reason of any phase against rotating an attention's heads."""
        for name, sites in self.context.sites.items():
            for site in sites.attention:
                if site.place == place:
                    edit = Edit(self.context.phases[name], self.context.tensors)
                    reason = RotateHeads(**options).guard(site, edit)
                    if reason is not None:
                        return reason
        return None

    def _is_online(self, site: LinearSite) -> bool:
        precision = self.wanted.get(site.place)
        known = precision is not None and precision.weight_bits == 4 and precision.activation_bits != 16
        return known and site.role == "down"

    def _helps_online(self, site: LinearSite) -> bool:
        """R4: whether a Hadamard matrix before a linear lessens its error."""
        if self.method.rotate == "always":
            return True
        precision = self.wanted[site.place]
        rows, weight = self.rows[site.node], self._weight(site.node)
        before = output_error(rows, weight, precision, lambda x: x)
        return output_error(rows, weight, precision, hadamard.reference) < before

    def _precision(self, linear: Node) -> Precision | None:
        site = self.sites.get(linear)
        return None if site is None else self.wanted.get(site.place)

    def _weight(self, linear: Node) -> Tensor:
        return self._stored(arguments(linear)["weight"])

    def _stored(self, node: Node) -> Tensor:
        tensor = self.view.tensor(node)
        assert tensor is not None
        return tensor.detach().float()

    def _decide(self, place: str, pass_name: str, options: dict[str, Any], facts: dict[str, str]) -> None:
        self._say(place, Decision(site="", method="", pass_name=pass_name, options=options, reason="", facts=facts))

    def _refuse(self, place: str, pass_name: str, reason: str, facts: dict[str, str] | None = None) -> None:
        self._say(
            place, Decision(site="", method="", pass_name=pass_name, status="refused", reason=reason, facts=facts or {})
        )

    def _say(self, place: str, decision: Decision) -> None:
        """One decision in each phase that has the place."""
        for phase, sites in self.context.sites.items():
            if any(site.place == place for site in sites.all):
                changes = {"site": f"{phase}/{place}", "method": self.method.name}
                self.decisions.append(decision.model_copy(update=changes))


_JUDGED = 8
"""Norms of a stream whose readers judge its rotation; the layers of a model are much alike in this."""


def _tensor_name(place: str) -> str:
    """A place as the name of a buffer: letters, digits, underscores and dots."""
    return "dartquant." + re.sub(r"[^\w.]+", "_", place).strip("_")


def _widest(context: Context) -> str:
    """The phase that sees most values at once."""
    counts = {name: tokens_of(context.calibration.get(name, [])) for name in context.sites}
    return max(counts, key=lambda name: counts[name])


def _hessian(rows: Sequence[Tensor], site: LinearSite) -> Tensor:
    total = torch.zeros(site.in_features, site.in_features)
    for part in rows:
        total.addmm_(part.t(), part)
    if not total.isfinite().all():
        raise InvalidArgument(f"the activations at {site.id} hold NaN or infinity; check the calibration")
    return total
