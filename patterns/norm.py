"""Normalisation layers over the last dimension: RMSNorm and LayerNorm, each one operator in a canonical program.

rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight
layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from .graph import GraphView, Refusal, scalar_of
from .nodes import CASTS, arguments, aten, dtype_of, is_call, strip
from .site import Found, Ordinals, Site

RMS_NORM = aten.rms_norm.default
LAYER_NORM = aten.layer_norm.default
_OTHERS = (aten.group_norm.default, aten.native_group_norm.default, aten.batch_norm.default)


@dataclass(frozen=True)
class NormSite(Site):
    """One `aten.rms_norm` or `aten.layer_norm`.

    Attributes:
        form: Which of the two.
        input: [..., size].
        weight: Placeholder of the gain [size], or None.
        bias: Placeholder of the shift [size], or None.
        eps: Added to the mean square.
        size: Length of the last dimension, over which values are normalised.
        gain_offset: The gain is `gain_offset + weight`; 0 in a canonical program, which stores the sum.
    """

    kind: ClassVar[str] = "norm"

    form: Literal["rms_norm", "layer_norm"]
    input: Node
    weight: Node | None
    bias: Node | None
    eps: float
    size: int
    gain_offset: float = 0.0

    def describe(self) -> dict[str, str]:
        """Facts for tables."""
        offset = f"{self.gain_offset:g} + weight" if self.gain_offset else "weight"
        return {
            "form": self.form,
            "size": str(self.size),
            "eps": f"{self.eps:g}",
            "gain": offset if self.weight is not None else "none",
            "bias": "yes" if self.bias is not None else "no",
            "dtype": str(dtype_of(self.input)).removeprefix("torch."),
        }


def find_norms(view: GraphView, phase: str = "main") -> Found[NormSite]:
    """Find every RMSNorm and LayerNorm of a functional program.

    Refused, with the fact: normalising over several dimensions or over groups, and a gain or a bias that is computed.
    """
    sites: list[NormSite] = []
    refusals: list[Refusal] = []
    ordinals = Ordinals(phase)
    for node in view.graph.nodes:
        if is_call(node, *_OTHERS):
            refusals.append(view.refuse(node, "normalises over groups or the batch", operator=str(node.target)))
        if not is_call(node, RMS_NORM, LAYER_NORM):
            continue
        site = _match(view, node, ordinals.next_id(view.module_path(node), NormSite.kind))
        if isinstance(site, Refusal):
            refusals.append(site)
        else:
            sites.append(site)
    return Found(tuple(sites), tuple(refusals))


def _match(view: GraphView, node: Node, site_id: str) -> NormSite | Refusal:
    args = arguments(node)
    sizes = list(args["normalized_shape"])
    if len(sizes) != 1 or not isinstance(sizes[0], int):
        return view.refuse(node, "does not normalise over the last dimension alone", depth=1, normalized_shape=sizes)
    weight, offset = _gain(view, args["weight"])
    bias = args.get("bias")
    if weight is not None and not view.is_weight(weight):
        return view.refuse(node, "computed gain", depth=2, gain=weight.name)
    if bias is not None and not view.is_weight(bias):
        return view.refuse(node, "computed bias", depth=3, bias=bias.name)
    return NormSite(
        id=site_id,
        node=node,
        module_path=view.module_path(node),
        source=view.source(node),
        form="rms_norm" if node.target is RMS_NORM else "layer_norm",
        input=args["input"],
        weight=weight,
        bias=bias,
        eps=_eps(args["eps"], args["input"]),
        size=sizes[0],
        gain_offset=offset,
    )


def _gain(view: GraphView, node: Node | None) -> tuple[Node | None, float]:
    """(weight, c) of a gain `c + weight`."""
    if node is not None and is_call(node, aten.add.Tensor, aten.add.Scalar):
        for weight, offset in (node.args[:2], node.args[1::-1]):
            value = scalar_of(view, offset)
            if value is not None and isinstance(weight, Node):
                return strip(weight, CASTS), value
    return node, 0.0


def _eps(eps: float | None, source: Node) -> float:
    """The epsilon; rms_norm's default is that of the type it accumulates in, float32 for the half types (measured)."""
    if eps is not None:
        return float(eps)
    dtype = dtype_of(source)
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
