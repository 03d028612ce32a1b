"""Which heads read far back: their attention to earlier copies of random tokens.

A text of K random tokens, repeated, has no meaning, so what a head sees of earlier copies it sees by retrieval:

    echo(h)      = mean_i sum_t A_h[i, i - t K]            the mass on the token's own earlier copies
    induction(h) = mean_i sum_t A_h[i, i - t K + 1]        the mass on what followed them

over all tokens i that have an earlier copy, t = 1, 2, ... counting the copies. A is the model's own attention, rotary
embeddings included. A group of heads that share a key-value head scores what its best head scores, since what is kept
are key-value heads.

No attention matrix is formed: the logarithm of each row's sum is taken block by block, and only the few diagonals that
are asked for are computed besides.

Source: RazorAttention (Tang et al. 2024, arXiv 2407.15891), section 3.2: K = 2500, four repetitions, 14% of the heads
by induction and 1% by echo. That all earlier copies count and that groups score by their best head is how the authors'
vendor library does it (msModelSlim, `ra_compress`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import InvalidArgument
from ..patterns.cache import CacheSite
from .walk import walk

ROWS = 256
"""Queries whose scores are formed at a time: 10,000 keys for 8 heads are 82 MB."""


@dataclass(frozen=True)
class HeadScores:
    """The scores of one layer's key-value heads.

    Attributes:
        place: The cache site without its phase.
        induction, echo: One number a key-value head, between 0 and 1.
    """

    place: str
    induction: tuple[float, ...]
    echo: tuple[float, ...]


def repeated_tokens(vocabulary: int, period: int, repeats: int, seed: int, special: Sequence[int] = ()) -> Tensor:
    """Random tokens, repeated: int64 [1 + period * repeats], the first of `special` (or token 0) in front.

    Args:
        vocabulary: Tokens that there are.
        period: K; the tokens are different ones where the vocabulary has so many.
        repeats: Copies.
        seed: Of the draw.
        special: Tokens that are not drawn.

    Raises:
        InvalidArgument: No token is left to draw, or fewer than two copies of two tokens are asked for.
    """
    if period < 2 or repeats < 2:
        raise InvalidArgument(f"got {period} tokens {repeats} times, expected at least 2 tokens twice")
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[list(special)] = False
    ids = allowed.nonzero()[:, 0]
    if len(ids) == 0:
        raise InvalidArgument("every token of the vocabulary is special, none is left to draw")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(ids), generator=generator)[:period]
    if len(drawn) < period:
        drawn = torch.randint(len(ids), (period,), generator=generator)
    return torch.cat([torch.tensor(list(special[:1]) or [0]), ids[drawn].repeat(repeats)])


def score_heads(
    exported: ExportedProgram,
    sites: Sequence[CacheSite],
    inputs: Sequence[list[Any]],
    period: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[HeadScores]:
    """Score the key-value heads of all sites.

    Args:
        exported: A canonical phase that starts at position 0 and computes many tokens at once.
        sites: Its caches, in order.
        inputs: Flat inputs with tokens as `repeated_tokens` makes them; scores are the mean of all.
        period: K.
        on_step: Called after each layer of each input.

    Returns:
        One record a site, in their order.
    """
    found: dict[Node, list[tuple[Tensor, Tensor]]] = {site.node: [] for site in sites}

    def handler(site: CacheSite) -> Callable[[list[tuple[Any, ...]]], list[Any]]:
        def attend(calls: list[tuple[Any, ...]]) -> list[Any]:
            results = []
            for args in calls:
                scale = site.node.kwargs.get("scale")
                found[site.node].append(mass_on_copies(args[0], args[1], period, scale))  # pyright: ignore[reportArgumentType] (a canonical attention's scale is a number)
                target: Any = site.node.target
                results.append(target(*args, **site.node.kwargs))
                on_step()
            return results

        return attend

    walk(exported, inputs, {site.node: handler(site) for site in sites})
    scores = []
    for site in sites:
        echo, induction = (torch.stack(parts).mean(0) for parts in zip(*found[site.node], strict=True))
        scores.append(HeadScores(site.place, _of_groups(induction, site.kv_heads), _of_groups(echo, site.kv_heads)))
    return scores


def _of_groups(scores: Tensor, kv_heads: int) -> tuple[float, ...]:
    return tuple(scores.unflatten(0, (kv_heads, -1)).amax(-1).tolist())


def mass_on_copies(query: Tensor, key: Tensor, period: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Echo and induction of each query head, float32 [Hq] each, the mean of the batch.

    Args:
        query: [B, Hq, N, D], of a text that repeats every `period` tokens after its first.
        key: [B, H or Hq, M, D], M at least N; later keys are not looked at. H divides Hq.
        period: K, less than N - 1.
        scale: Of the scores; 1 / sqrt(D) by default.
    """
    count = query.shape[2]
    key = key[:, :, :count]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    echo, induction = (torch.zeros(query.shape[1]) for _ in range(2))
    repeats = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        keys = key[:, head // repeats].float()
        for low in range(1 + period, count, ROWS):
            rows = query[:, head, low : low + ROWS].float() * factor
            high = low + rows.shape[1]
            scores = rows @ keys[:, :high].mT
            later = torch.arange(high) > torch.arange(low, high)[:, None]
            total = scores.masked_fill_(later.to(scores.device), float("-inf")).logsumexp(-1, keepdim=True)
            for back in range(period, high - 1, period):
                first = max(low, 1 + back)  # queries before have no copy so far back
                seen = torch.arange(first - back, high - back, device=scores.device)[:, None]
                of = scores[:, first - low :]
                for mass, column in ((echo, seen), (induction, seen + 1)):
                    taken = of.gather(-1, column.expand(len(of), -1, -1))
                    mass[head] += (taken - total[:, first - low :]).exp().sum().cpu()
    tokens = (count - 1 - period) * len(query)
    return echo / tokens, induction / tokens
