"""How much attention a page may get, from the minimum and maximum of its keys; and the best pages by that.

    bound[h, j]  = sum_c max(q[h, c] least[j, c], q[h, c] most[j, c])          no key of page j has a larger q . k
    score[m, j]  = log mean_{h in group m} softmax_j(bound[h])[j]              over the candidates j, `mean_softmax`

Summaries are [B, H, P, 2, D]: minimum and maximum over the tokens of a page of the keys as they are cached (rotated).
Written as two products, bound = min(q, 0) . least + max(q, 0) . most, which is one matrix product over 2 D. The mean of
softmaxes is taken in the log domain: the order of pages is the same, and no score underflows to a tie of zeros.

Other poolings over the query heads of a group, for comparison: `max_softmax`; `mean_score` and `max_score` pool bounds,
`mean_query` and `max_query` pool queries before. `scaled` divides the bounds by sqrt(D) before the softmax.

Source: bound: Quest (Tang et al. 2024, arXiv 2406.10774), section 3; mean of softmaxes over the group and the other
poolings: FreeKV (Liu et al. 2025, arXiv 2505.13109), section 4.1 and its ablation.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InvalidArgument

Pooling = Literal["mean_softmax", "max_softmax", "mean_score", "max_score", "mean_query", "max_query"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


def summarize(keys: Tensor, real: Tensor | None = None) -> Tensor:
    """Minimum and maximum [..., 2, D] of the keys [..., page, D] of pages.

    Args:
        keys: Any floating dtype, which the summary keeps: both are keys' own values, so nothing is rounded.
        real: bool [..., page], which tokens count (the others are padding); a page without any gets zeros.
    """
    if real is None:
        return torch.stack(torch.aminmax(keys, dim=-2), -2)
    real = real.unsqueeze(-1)
    least = keys.masked_fill(~real, float("inf")).amin(-2)
    most = keys.masked_fill(~real, float("-inf")).amax(-2)
    both = torch.stack((least, most), -2)
    return torch.where(real.any(-2).unsqueeze(-2), both, 0.0).to(keys.dtype)


def page_scores(
    summary: Tensor, query: Tensor, allowed: Tensor, pooling: str = "mean_softmax", scaled: bool = False
) -> Tensor:
    """Scores float32 [B, H, N, P] of pages for queries [B, Hq, N, D]; -inf where a page is no candidate.

    Args:
        summary: [B, H, P, 2, D].
        query: Any floating dtype; H divides Hq, and query heads h H // Hq share a key head.
        allowed: The candidates: bool, broadcastable to [B, 1, N, P].
        pooling: One of `POOLINGS`.
        scaled: Divide bounds by sqrt(D) before a softmax.
    """
    batch, heads, pages, _, dim = summary.shape
    grouped = query.float().unflatten(1, (heads, -1))  # [B, H, G, N, D]
    if pooling == "mean_query":
        grouped = grouped.mean(2, keepdim=True)
    elif pooling == "max_query":
        grouped = grouped.amax(2, keepdim=True)
    signed = torch.cat((grouped.clamp_max(0), grouped.clamp_min(0)), -1).flatten(2, 3)
    bounds = signed @ summary.float().reshape(batch, heads, pages, 2 * dim).mT
    bounds = bounds.unflatten(2, (grouped.shape[2], -1))  # [B, H, G, N, P]
    hidden = ~allowed.unsqueeze(2)
    if pooling.endswith("_softmax"):
        if scaled:
            bounds = bounds * dim**-0.5
        shares = bounds.masked_fill(hidden, float("-inf")).log_softmax(-1)
        pooled = shares.amax(2) if pooling == "max_softmax" else shares.logsumexp(2) - math.log(shares.shape[2])
    else:
        pooled = bounds.amax(2) if pooling == "max_score" else bounds.mean(2)
    return pooled.masked_fill(~allowed, float("-inf"))  # where there is no candidate, a softmax is not a number


def best_pages(scores: Tensor, count: int) -> Tensor:
    """The `count` best of the candidates, as bool [..., P]; all of them where there are no more. Scores as above."""
    found = scores.topk(min(count, scores.shape[-1]), -1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, found.indices, found.values > float("-inf"))


def turned(query: Tensor, previous: Tensor, heads: int, tau: float) -> Tensor:
    """Which groups turned away from their previous query: bool [B, H, N] of queries [B, Hq, N, D].

    A group has turned if the mean over its query heads of cos(q, previous) is below `tau`. A `tau` above 1 means
    always, one of -1 or less never.
    """
    if tau > 1 or tau <= -1:
        return torch.full((query.shape[0], heads, query.shape[2]), tau > 1, device=query.device)
    alike = functional.cosine_similarity(query.float(), previous.float(), dim=-1)
    return alike.unflatten(1, (heads, -1)).mean(2) < tau


def require_pooling(pooling: str) -> None:
    """Refuse an unknown pooling with `InvalidArgument`."""
    if pooling not in POOLINGS:
        raise InvalidArgument(f"got pooling {pooling!r}, expected one of {', '.join(POOLINGS)}")
