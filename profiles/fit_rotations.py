"""All rotations of a program: fitted to sampled activations, judged by what their readers lose, decided on.

R1 for each residual stream, R2 for the values of each attention, R3 for its keys where they are quantized, R4 before
each down projection. `rotate="auto"` keeps a rotation where the linears behind it, rounded to nearest, err less with it
than without.

Source: DartQuant, arXiv:2511.04063; the four rotations are SpinQuant's (Liu et al. 2024, arXiv:2405.16406).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import hadamard
from ..passes.decision import Decision
from ..passes.edit import Edit
from ..passes.rotate_heads import RotateHeads
from ..patterns.attention import AttentionSite
from ..patterns.graph import GraphView, Refusal
from ..patterns.linear import LinearSite
from ..patterns.nodes import arguments
from ..patterns.residual import ResidualStream
from ..patterns.value_path import ValuePath, find_value_path, per_head
from .activation_samples import FEWEST, Precision, output_error, sample_rows
from .method import Context

if TYPE_CHECKING:
    from .dartquant import DartQuant


class Rotations:
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
        linears = [found.path.output for found in rotatable]
        if method.rotate == "auto":  # else nothing is judged by them
            linears += [site.node for site in down]
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
        tokens = self._together([norm for norm, _ in stream.norms])
        rotation = self.method.fit_stream(tokens, self.generator, self.context.progress.step)
        facts = stream.describe()
        if self.method.rotate == "auto":
            before, after = self._reader_errors(stream, rotation)
            facts["error unrotated, rotated"] = f"{before:.4g}, {after:.4g}"
            if after >= before:
                return self._refuse(stream.place, "rotate", "measured no better than unrotated", facts)
        name = f"{tensor_name(stream.place)}.rotation"
        self.context.tensors[name] = rotation
        self.flat |= {self.sites[linear].place for linear in read}
        self._decide(stream.place, "rotate", {"rotation": name}, facts)
        return None

    def _together(self, norms: Sequence[Node]) -> Tensor:
        """The rows of some norms as one tensor, of which their own become views: at no time is much held twice."""
        counts = [len(self.rows[norm]) for norm in norms]
        tokens = self.rows[norms[0]].new_empty(sum(counts), self.rows[norms[0]].shape[-1])
        for norm, part in zip(norms, tokens.split(counts), strict=True):
            self.rows[norm] = part.copy_(self.rows[norm])
        return tokens

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
            name = f"{tensor_name(site.place)}.values"
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


def tensor_name(place: str) -> str:
    """A place as the name of a buffer: letters, digits, underscores and dots."""
    return "dartquant." + re.sub(r"[^\w.]+", "_", place).strip("_")


class _Heads(NamedTuple):
    """An attention whose values can be rotated, with the linears around it."""

    site: AttentionSite
    path: ValuePath
