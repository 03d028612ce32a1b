"""Traceable bodies of sparse attention: dense scores under the mask that the lists stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.block_lists import keep_of
from ...kernels.block_sparse_attention import list_rows


def block_sparse_body(*tensors: Tensor | None, **options: Any) -> Tensor:
    """`block_sparse_attention`: [B, H, N, D]."""
    return block_sparse_lse_body(*tensors, **options)[0]  # pyright: ignore[reportArgumentType] (as the operator's)


def block_sparse_lse_body(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    blocks: Tensor,
    pattern: Tensor | None = None,
    order: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    key_blocks: int,
    block_size: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention_lse`: the output, and the logarithm of each query's sum."""
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    places = (queries, key.shape[2]) if order is None else (order.shape[1], order.shape[1])
    kept = _kept(counts, blocks, places, key_blocks, block_size)
    if order is not None:
        kept = _by_token(kept, order, queries)
    rows = list_rows(pattern, counts.shape[0], batch, heads, query.device)
    seen = kept[rows.flatten()].unflatten(0, (batch, heads))
    k, v = (t.float().repeat_interleave(group, 1) for t in (key, value))
    scores = query.float() @ k.mT * (head_dim**-0.5 if scale is None else scale)
    if key_bias is not None:
        scores = scores + key_bias[:, :, None]
    scores = scores.masked_fill(~seen, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - torch.where(peak == -math.inf, 0.0, peak)).exp()
    total = weights.sum(-1, keepdim=True)
    output = (weights @ v) / torch.where(total == 0, 1.0, total)
    return output.to(query.dtype), (total.log() + peak).squeeze(-1)


def _kept(counts: Tensor, blocks: Tensor, places: tuple[int, int], key_blocks: int, block_size: int) -> Tensor:
    """Which position attends to which, bool [R, P, P]; what the lists do not govern is dense."""
    rows, governed = counts.shape
    keep = keep_of(counts, blocks, key_blocks)
    keep = torch.cat([keep, keep.new_ones(rows, governed, 1)], 2)
    keep = torch.cat([keep, keep.new_ones(rows, 1, key_blocks + 1)], 1)
    at = [torch.arange(length, device=counts.device) // block_size for length in places]
    return keep[:, at[0].clamp(max=governed)][:, :, at[1].clamp(max=key_blocks)]


def _by_token(kept: Tensor, order: Tensor, tokens: int) -> Tensor:
    """The map of positions as one of tokens: each token has the place where the order puts it, or none."""
    rows, length = kept.shape[0], order.shape[1]
    # Empty positions are written to a token behind the last, which is cut off.
    at = torch.where(order < 0, tokens, order).long()
    places = torch.arange(length, device=order.device).expand(at.shape)
    place = places.new_full((at.shape[0], tokens + 1), -1).scatter(1, at, places)[:, :tokens].expand(rows, tokens)
    index, there = place.clamp(min=0), place >= 0
    by_row = kept.gather(1, index[:, :, None].expand(rows, tokens, length))
    both = by_row.gather(2, index[:, None, :].expand(rows, tokens, tokens))
    return both & there[:, :, None] & there[:, None, :]


def snap_tokens_body(
    x: Tensor,
    theta: Tensor,
    groups: Sequence[int],
    factors: Sequence[float],
    *,
    frames: int,
    height: int,
    width: int,
    first: int,
    axes: Sequence[int],
    window: int,
    granularity: str,
) -> tuple[Tensor, Tensor]:
    """`snap_tokens`: every element goes back to its root, step by step."""
    grid = (frames, height, width)
    tokens = frames * height * width
    video = x[:, :, first : first + tokens]
    root = _roots(video, theta, groups, factors, grid, axes, window, granularity)
    snapped = torch.cat([x[:, :, :first], video.gather(2, root), x[:, :, first + tokens :]], 2)
    return snapped, (root != torch.arange(tokens, device=x.device)[:, None]).sum(2).int()


def token_roots_body(
    x: Tensor, theta: Tensor, *, frames: int, height: int, width: int, first: int, axes: Sequence[int], window: int
) -> Tensor:
    """`token_roots`: int32 [B, H, N]."""
    tokens = frames * height * width
    video = x[:, :, first : first + tokens]
    root = _roots(video, theta, [x.shape[3]], [1.0], (frames, height, width), axes, window, "token")[..., 0] + first
    own = torch.arange(x.shape[2], device=x.device).expand(x.shape[:3])
    return torch.cat([own[:, :, :first], root, own[:, :, first + tokens :]], 2).int()


def _roots(
    video: Tensor,
    theta: Tensor,
    groups: Sequence[int],
    factors: Sequence[float],
    grid: tuple[int, int, int],
    axes: Sequence[int],
    window: int,
    granularity: str,
) -> Tensor:
    last = video.shape[2] - 1
    limit = torch.cat([(theta * factor).expand(size) for size, factor in zip(groups, factors, strict=True)])
    tokens = torch.arange(last + 1, device=video.device)
    back = torch.zeros(video.shape, dtype=torch.int64, device=video.device)
    for axis in sorted(axes, reverse=True):
        stride = math.prod(grid[axis + 1 :])
        at = tokens // stride % grid[axis]
        start = tokens - at % window * stride
        members = [video[:, :, (start + k * stride).clamp(max=last)].float() for k in range(window)]
        if window == 2:
            delta = (members[1] - members[0]).abs() / 2
        else:
            # In the order of the kernel, since a flag may hang on the last bit.
            mean: Any = sum(members) / window
            variance: Any = sum((member - mean).square() for member in members) / window
            delta = variance.sqrt()
        inside = (at % window != 0) & (at - at % window + window <= grid[axis])
        flagged = (_shared(delta, groups, granularity) < limit) & inside[:, None]
        back = torch.where(flagged, (tokens - start)[:, None], back)
    root = tokens[:, None] - back
    for _ in range(2):  # three steps at most, and each time they double
        root = root.gather(2, root)
    return root


def _shared(delta: Tensor, groups: Sequence[int], granularity: str) -> Tensor:
    """Delta as its flags see it: of each channel, or the root mean square of those that share a flag."""
    if granularity == "element":
        return delta
    parts = delta.square().split(list(groups) if granularity == "group" else [delta.shape[-1]], -1)
    return torch.cat([part.mean(-1, keepdim=True).sqrt().expand(part.shape) for part in parts], -1)
