"""The CPU implementation of `quantized_cache_attention`: packed bytes are read in blocks that stay in the cache.

Scores of all keys are kept for a block of queries, keys and values in floating point for a block of tokens only. Where
a group is a whole token its scale and minimum are taken out of the products,

    q . k'        = scale (q . code) + minimum (sum_c q_c)
    sum_j w_j v'_j = sum_j (w_j scale_j) code_j + sum_j w_j minimum_j

so that the codes need one conversion each and no arithmetic; the other forms are dequantized.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .packed_cache import GROUP, Packing, Planes, dequantize

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
) -> Tensor:
    """Attention, arguments unchecked; see `quantized_cache_attention.py`."""
    batch, heads, count, dim = query.shape
    groups = keys.codes.shape[1]
    output = query.new_empty(batch, heads, count, values_as.head_dim)
    if count == 0:
        return output
    first, last = int(positions[0]), int(positions[-1])
    cut = last // GROUP * GROUP if keys_as.has_tail else last + 1
    # One piece of memory for the codes of all blocks: fresh pages cost as much as the conversion.
    scratch = torch.empty(batch * groups * min(TOKENS, last + 1) * max(dim, values_as.head_dim))
    for start in range(0, count, QUERIES):
        stop = min(start + QUERIES, count)
        rows = query[:, :, start:stop].float().mul(scale)
        rows = rows.reshape(batch, groups, -1, dim)
        seen = first + stop
        begin = max(0, first + start - window + 1) if window else 0
        scores = rows.new_empty(*rows.shape[:3], seen - begin)
        for low, high in _blocks(begin, seen, cut, keys_as):
            scores[..., low - begin : high - begin] = _dot(rows, keys, keys_as, low, high, cut, scratch)
        if stop - start > 1:
            _hide(scores.unflatten(2, (-1, stop - start)), first + start, begin, window)
        weights = scores.softmax(-1)
        result = rows.new_zeros(*rows.shape[:3], values_as.head_dim)
        for low, high in _blocks(begin, seen, cut, values_as):
            _add_values(result, weights[..., low - begin : high - begin], values, values_as, low, high, cut, scratch)
        output[:, :, start:stop] = result.view(batch, heads, stop - start, -1)
    return output


def _blocks(begin: int, stop: int, cut: int, packing: Packing) -> Iterator[tuple[int, int]]:
    """Ranges of tokens, none across the cut; where blocks of tokens share steps, ranges start at one."""
    low = begin
    while low < min(stop, cut):
        high = min(low // GROUP * GROUP + TOKENS, stop, cut)
        yield low, high
        low = high
    if packing.has_tail and stop > max(cut, begin):
        yield max(cut, begin), stop


def _dot(rows: Tensor, planes: Planes, packing: Packing, low: int, high: int, cut: int, scratch: Tensor) -> Tensor:
    """Scores [B, H, rows, high - low] of scaled queries [B, H, rows, D]."""
    if packing.has_tail:
        return rows @ _tokens(planes, packing, low, high, cut).mT
    scale, minimum = _steps(planes, low, high)
    scores = rows @ _codes(planes, packing, low, high, scratch).mT
    return scores.mul_(scale).addcmul_(rows.sum(-1, keepdim=True), minimum)


def _add_values(
    result: Tensor, weights: Tensor, planes: Planes, packing: Packing, low: int, high: int, cut: int, scratch: Tensor
) -> None:
    """Add what tokens contribute, with weights [B, H, rows, high - low], to the result [B, H, rows, E]."""
    if packing.has_tail:
        result += weights @ _tokens(planes, packing, low, high, cut)
        return
    scale, minimum = _steps(planes, low, high)
    result += (weights * scale) @ _codes(planes, packing, low, high, scratch)
    result += (weights * minimum).sum(-1, keepdim=True)


def _steps(planes: Planes, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum [B, H, 1, high - low] of tokens that are a group each."""
    scale, minimum = planes.steps[:, :, None, low:high, 0].float().unbind(-1)
    return scale, minimum


def _codes(planes: Planes, packing: Packing, low: int, high: int, scratch: Tensor) -> Tensor:
    """Codes as float32 [B, H, high - low, D], in the scratch memory."""
    packed, bits = planes.codes[:, :, low:high], packing.bits
    shape = (*packed.shape[:3], packing.head_dim)
    codes = scratch[: packed.numel() * 8 // bits].view(shape)
    for part, out in enumerate(codes.split(packing.row, -1)):
        shifted = packed if part == 0 else packed >> (bits * part)
        # The highest bits have nothing above them.
        out.copy_(shifted if bits * (part + 1) == 8 else shifted & (2**bits - 1))
    return codes


def _tokens(planes: Planes, packing: Packing, low: int, high: int, cut: int) -> Tensor:
    """Tokens as float32 [B, H, high - low, D]."""
    if low >= cut:
        assert planes.tail is not None
        return planes.tail[:, :, low - cut : high - cut].float()
    if packing.form != "per_channel":
        return dequantize(planes.codes[:, :, low:high], planes.steps[:, :, low:high], packing)
    start, stop = low // GROUP, -(-high // GROUP)
    block = dequantize(planes.codes[:, :, start * GROUP : stop * GROUP], planes.steps[:, :, start:stop], packing)
    return block[:, :, low - start * GROUP : high - start * GROUP]


def _hide(scores: Tensor, first: int, begin: int, window: int) -> None:
    """Hide from queries at `first`, `first` + 1, ... of scores [..., queries, keys] what they may not see."""
    i = torch.arange(first, first + scores.shape[-2])[:, None]
    j = torch.arange(begin, begin + scores.shape[-1])
    hidden = j > i
    if window:
        hidden |= j <= i - window
    scores.masked_fill_(hidden, float("-inf"))
