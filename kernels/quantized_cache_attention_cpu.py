"""The CPU implementation of `quantized_cache_attention`: packed bytes are read in blocks that stay in the cache.

Scores of all keys are kept for a block of queries, keys and values in floating point for a block of tokens only. Where
a group is a whole token its scale and minimum are taken out of the products,

    q . k'        = scale (q . code) + minimum (sum_c q_c)
    sum_j w_j v'_j = sum_j (w_j scale_j) code_j + sum_j w_j minimum_j

so that the codes need one conversion each and no arithmetic; the other forms are dequantized, block by block. Nor are
codes shifted: what stands higher in a byte is a power of two too large, which the queries and the sums take back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .packed_cache import GROUP, Packing, Planes

TOKENS = 1024
"""Keys or values of a block: 3 heads of 64 channels in float32 are 0.8 MB, within a core's second-level cache."""
QUERIES = 128
"""Queries of a block: what their scores cost in memory, and how often the codes are converted."""


def attend(
    query: Tensor,
    keys: Planes,
    values: Planes,
    positions: Tensor,
    keys_as: Packing,
    values_as: Packing,
    scale: float,
    window: int,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention, arguments unchecked; see `quantized_cache_attention.py`."""
    batch, heads, count, dim = query.shape
    groups = keys.codes.shape[1]
    output = query.new_empty(batch, heads, count, values_as.head_dim)
    if count == 0:
        return output
    first, last = int(positions[0]), int(positions[-1])
    padded = 0 if starts is None else max(0, min(int(starts.min()), last))  # what no sequence sees is not read
    cut = last // GROUP * GROUP if keys_as.has_tail else last + 1
    # One piece of memory for the codes of all blocks: fresh pages cost as much as the conversion.
    scratch = torch.empty(batch * groups * min(TOKENS, last + GROUP) * max(dim, values_as.head_dim))
    for start in range(0, count, QUERIES):
        stop = min(start + QUERIES, count)
        rows = query[:, :, start:stop].float().mul(scale)
        rows = rows.reshape(batch, groups, -1, dim)
        seen = first + stop
        begin = max(padded, first + start - window + 1) if window else padded
        begin = min(begin, first + start)
        scores = _scores(rows, keys, keys_as, begin, seen, cut, scratch)
        if stop - start > 1:
            _hide(scores.unflatten(2, (-1, stop - start)), first + start, begin, window)
        weights = scores.softmax(-1) if starts is None else _weights_from(scores, starts, begin)
        result = _weigh(weights, values, values_as, begin, seen, cut, scratch)
        output[:, :, start:stop] = result.view(batch, heads, stop - start, -1)
    return output


def _scores(rows: Tensor, planes: Planes, packing: Packing, begin: int, stop: int, cut: int, scratch: Tensor) -> Tensor:
    """Scores [B, H, rows, stop - begin] of scaled queries [B, H, rows, D]."""
    scores = rows.new_empty(*rows.shape[:3], stop - begin)
    total = rows.sum(-1, keepdim=True)
    rows = rows if packing.has_tail else rows * _units(packing)
    for low, high in _blocks(begin, stop, cut, packing):
        tokens = _tokens(planes, packing, low, high, cut, scratch)
        scores[..., low - begin : high - begin] = rows @ tokens.mT
    if packing.has_tail:
        return scores
    scale, minimum = _steps(planes, begin, stop)
    return scores.mul_(scale).addcmul_(total, minimum)


def _weigh(
    weights: Tensor, planes: Planes, packing: Packing, begin: int, stop: int, cut: int, scratch: Tensor
) -> Tensor:
    """The sum [B, H, rows, E] of values with weights [B, H, rows, stop - begin]."""
    result = weights.new_zeros(*weights.shape[:3], packing.head_dim)
    least = None
    if not packing.has_tail:
        scale, minimum = _steps(planes, begin, stop)
        least = (weights * minimum).sum(-1, keepdim=True)
        weights = weights * scale
    for low, high in _blocks(begin, stop, cut, packing):
        result += weights[..., low - begin : high - begin] @ _tokens(planes, packing, low, high, cut, scratch)
    return result if least is None else torch.addcmul(least, result, _units(packing))


def _blocks(begin: int, stop: int, cut: int, packing: Packing) -> Iterator[tuple[int, int]]:
    """Ranges of tokens, none across the cut; where blocks of tokens share steps, ranges start at one."""
    low = begin
    while low < min(stop, cut):
        high = min(low // GROUP * GROUP + TOKENS, stop, cut)
        yield low, high
        low = high
    if packing.has_tail and stop > max(cut, begin):
        yield max(cut, begin), stop


def _steps(planes: Planes, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum [B, H, 1, high - low] of tokens that are a group each."""
    scale, minimum = planes.steps[:, :, None, low:high, 0].float().unbind(-1)
    return scale, minimum


def _codes(planes: Planes, packing: Packing, low: int, high: int, scratch: Tensor) -> Tensor:
    """Codes over `_units` as float32 [B, H, high - low, D], in the scratch memory: masked, not shifted."""
    packed, bits = planes.codes[:, :, low:high], packing.bits
    codes = scratch[: packed.numel() * 8 // bits].view(*packed.shape[:3], packing.head_dim)
    if bits == 8:
        return codes.copy_(packed)
    for part in range(8 // bits):
        mask = (2**bits - 1) << (bits * part)
        codes[..., part * packing.row : (part + 1) * packing.row].copy_(packed & mask)
    return codes


@cache
def _units(packing: Packing) -> Tensor:
    """float32 [D]: what one step of each channel's bits is worth where they stand in their byte, inverted."""
    parts = [2.0 ** -(packing.bits * part) for part in range(8 // packing.bits)]
    return torch.tensor(parts, device="cpu").repeat_interleave(packing.row)


def _tokens(planes: Planes, packing: Packing, low: int, high: int, cut: int, scratch: Tensor) -> Tensor:
    """Tokens as float32 [B, H, high - low, D]; where a group is a whole token, their codes over `_units`."""
    if low >= cut and planes.tail is not None:
        return planes.tail[:, :, low - cut : high - cut].float()
    if packing.form == "per_token":
        return _codes(planes, packing, low, high, scratch)
    start, stop = low // GROUP, -(-high // GROUP)
    codes = _codes(planes, packing, start * GROUP, stop * GROUP, scratch)
    if packing.bits < 8:
        codes.mul_(_units(packing))
    # The dimension of a group's members: 32 tokens of a channel, or 32 channels of a token.
    dim, unit = (2, GROUP) if packing.form == "per_channel" else (3, 1)
    grouped = codes.unflatten(dim, (-1, GROUP))
    scale, minimum = planes.steps[:, :, start * GROUP // unit : stop * GROUP // unit].float().unbind(-1)
    grouped.mul_(scale.unsqueeze(dim + 1)).add_(minimum.unsqueeze(dim + 1))
    return codes[:, :, low - start * GROUP : high - start * GROUP]


def _hide(scores: Tensor, first: int, begin: int, window: int) -> None:
    """Hide from queries at `first`, `first` + 1, ... of scores [..., queries, keys] what they may not see."""
    i = torch.arange(first, first + scores.shape[-2])[:, None]
    j = torch.arange(begin, begin + scores.shape[-1])
    hidden = j > i
    if window:
        hidden |= j <= i - window
    scores.masked_fill_(hidden, float("-inf"))


def _weights_from(scores: Tensor, starts: Tensor, begin: int) -> Tensor:
    """Weights [B, H, rows, keys] of keys at `starts` [B] and later; none for a query that sees no key."""
    early = torch.arange(begin, begin + scores.shape[-1]) < starts[:, None, None, None]
    scores.masked_fill_(early, float("-inf"))
    blind = scores.amax(-1, keepdim=True) == float("-inf")
    return scores.softmax(-1).masked_fill_(blind, 0.0)
