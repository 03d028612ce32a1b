"""How far back a head with an ALiBi bias can see, from weights alone.

The scores of a query at position m are, up to what is the same for the whole row,

    S[n] = s q_m . k_n - l (m - n)         q_m = W_q x_m + b_q,   k_n = W_k x_n + b_k,   x = gain * h + shift

where h is a normalised hidden state, |h| <= sqrt(d). The weight of key n is at most exp(S[n] - S[m]), since the query
sees its own key as well. In that difference shift and bias of the keys are gone, they are the same in k_n and k_m. With

    Q = W_q diag(gain),   K = W_k diag(gain),   c = W_q shift + b_q

    S[n] - S[m] = s (Q h_m + c) . K (h_n - h_m) - l (m - n)  <=  B - l (m - n),
    B = 2 s (d |Q^T K| + sqrt(d) |K^T c|)                                        |.|: spectral norm, or of a vector

so every key further back than

    L = (B - log eps) / l

has a weight of at most eps, for any text, and all of them together one of at most eps / (1 - exp(-l)).

The paper has B = 2 |W_q W_k^T| (|gain|^2 + |shift|^2). That is the same where the gain is one number and shift and
biases are zero. It is no bound otherwise: with a large gain for one feature h can lie along it, and the biases of the
projections, which Bloom has, are not in it. So gain and biases are folded in here.

Source: RazorAttention (Tang et al. 2024, arXiv 2407.15891), section 3.1, theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..patterns.cache import CacheSite
from ..patterns.graph import GraphView, Refusal
from ..patterns.head_projection import HeadProjection, head_projection
from ..patterns.masks import analyse_mask
from ..patterns.nodes import CASTS, arguments, shape_of, strip
from ..patterns.norm import NormSite, find_norms

ALIBI = ("alibi", "cache_alibi")
"""Kinds of masks whose heads have a reach."""


@dataclass(frozen=True)
class HeadReach:
    """How far back one layer's heads see.

    Attributes:
        place: The cache site without its phase.
        slopes: l of each query head.
        bounds: B of each query head; infinite where nothing is proved.
        reach: L of each key-value head, in tokens: the largest of its query heads'.
        reason: Why nothing is proved, empty where it is.
    """

    place: str
    slopes: tuple[float, ...]
    bounds: tuple[float, ...]
    reach: tuple[float, ...]
    reason: str = ""


def head_reach(exported: ExportedProgram, sites: Sequence[CacheSite], eps: float, margin: int = 0) -> list[HeadReach]:
    """The reach of every head of cached attentions with ALiBi masks.

    Args:
        exported: A canonical program.
        sites: Its caches. Those whose mask has no slopes are left out of the result.
        eps: What the weight of a key beyond the reach is at most.
        margin: Tokens that are added to each reach.
    """
    view = GraphView(exported)
    norms = {norm.node: norm for norm in find_norms(view).sites}
    return [found for site in sites if (found := _reach(view, norms, site, eps, margin)) is not None]


def slopes_of(view: GraphView, site: CacheSite) -> tuple[float, ...]:
    """The slope of each query head of a cached attention; empty where its mask was not proved to have any."""
    args = arguments(site.attention)
    heads, queries, keys = shape_of(args["query"])[1], shape_of(args["query"])[-2], shape_of(args["key"])[-2]
    fact = analyse_mask(view, args["attn_mask"], queries, keys, is_causal=bool(args["is_causal"]))
    if fact.kind not in ALIBI:
        return ()
    return fact.slopes * heads if len(fact.slopes) == 1 else fact.slopes


def logit_bound(
    query: Tensor, query_bias: Tensor | None, key: Tensor, gain: Tensor | None, shift: Tensor | None, scale: float
) -> float:
    """B: the most by which one key's scaled product with a query can exceed another's.

    Args:
        query, key: W_q and W_k of one head, [head_dim, d].
        query_bias: b_q [head_dim], None for zeros. That of the keys does not matter.
        gain, shift: Of the normalisation before, [d]; None for ones and zeros.
        scale: s.
    """
    query, key = query.double(), key.double()
    center = torch.zeros_like(query[:, 0]) if query_bias is None else query_bias.double()
    if shift is not None:
        center = center + query @ shift.double()
    if gain is not None:
        query, key = query * gain.double(), key * gain.double()
    size = key.shape[1]
    # |Q^T K| without the d x d product: Q^T and K^T are orthonormal columns times small triangles.
    triangles = [torch.linalg.qr(weight.mT, mode="r").R for weight in (query, key)]
    norm = torch.linalg.matrix_norm(triangles[0] @ triangles[1].mT, ord=2)
    return float(2 * abs(scale) * (size * norm + math.sqrt(size) * torch.linalg.vector_norm(key.mT @ center)))


def _reach(view: GraphView, norms: dict[Node, NormSite], site: CacheSite, eps: float, margin: int) -> HeadReach | None:
    slopes = slopes_of(view, site)
    if not slopes:
        return None
    bounds = _bounds(view, norms, site)
    reason = ""
    if isinstance(bounds, str):
        bounds, reason = [math.inf] * len(slopes), bounds
    each = [
        (bound - math.log(eps)) / slope + margin if slope > 0 else math.inf
        for bound, slope in zip(bounds, slopes, strict=True)
    ]
    group = len(each) // site.kv_heads
    reach = tuple(max(each[head * group : (head + 1) * group]) for head in range(site.kv_heads))
    return HeadReach(site.place, slopes, tuple(bounds), reach, reason)


def _bounds(view: GraphView, norms: dict[Node, NormSite], site: CacheSite) -> list[float] | str:
    """B of each query head, or why there is none."""
    args = arguments(site.attention)
    query, key = head_projection(view, args["query"]), head_projection(view, site.new_key)
    if isinstance(query, Refusal) or isinstance(key, Refusal):
        return str(query if isinstance(query, Refusal) else key)
    norm = norms.get(strip(query.source, CASTS))
    if norm is None or strip(key.source, CASTS) is not norm.node:
        return "queries and keys are not projected from one normalised hidden state"
    gain, shift = (_tensor(view, node) for node in (norm.weight, norm.bias))
    if gain is not None:
        gain = gain.double() + norm.gain_offset
    scale = float(site.head_dim**-0.5 if args["scale"] is None else args["scale"])
    weights = [_weights(view, projection) for projection in (query, key)]
    group = len(weights[0]) // site.kv_heads
    return [
        logit_bound(weight, bias, weights[1][head // group][0], gain, shift, scale)
        for head, (weight, bias) in enumerate(weights[0])
    ]


def _weights(view: GraphView, projection: HeadProjection) -> list[tuple[Tensor, Tensor | None]]:
    """(weight [head_dim, features], bias [head_dim] or None) of each head."""
    weight, bias = _tensor(view, projection.weight), _tensor(view, projection.bias)
    assert weight is not None
    return [(weight[rows], None if bias is None else bias[rows]) for rows in projection.rows]


def _tensor(view: GraphView, node: Node | None) -> Tensor | None:
    stored = None if node is None else view.tensor(node)
    return None if stored is None else stored.detach()
