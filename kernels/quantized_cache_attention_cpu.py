"""The CPU implementation of `quantized_cache_attention`: packed bytes are read in blocks that stay in the cache.

Scores of all keys are kept for a block of queries, keys and values in floating point for a block of tokens only. Scales
and minima are taken out of the products, so that the codes need one conversion each and no arithmetic:

    a group is a token         q . k'         = scale (q . code) + minimum (sum_c q_c)
                               sum_j w_j v'_j = sum_j (w_j scale_j) code_j + sum_j w_j minimum_j
    32 tokens of a channel     q . k'         = sum_c (q_c scale_c) code_c + sum_c q_c minimum_c
    32 channels of a token     as of a token, for these channels

With many queries the last two would be more work than the codes themselves, which are then dequantized, block by
block. Nor are codes shifted: what stands higher in a byte is a power of two too large, which the queries and the sums
take back.
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
FEW = 16
"""Queries of a head of keys, up to which KIVI's scales are taken out of the products."""


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
    middle = max(begin, min(stop, cut))
    if middle < stop:
        scores[..., middle - begin :] = rows @ _tail(planes, middle - cut, stop - cut).mT
    packed = scores[..., : middle - begin]
    if packing.form == "per_token":
        in_units = rows * _units(packing)
        for low, high in _blocks(begin, middle):
            packed[..., low - begin : high - begin] = in_units @ _codes(planes, packing, low, high, scratch).mT
        scale, minimum = _steps(planes, begin, middle)
        packed.mul_(scale).addcmul_(rows.sum(-1, keepdim=True), minimum)
    elif begin < middle and rows.shape[2] <= FEW:
        packed.copy_(_scores_by_channel(rows, planes, packing, begin, middle, scratch))
    else:
        for low, high in _blocks(begin, middle):
            packed[..., low - begin : high - begin] = rows @ _tokens(planes, packing, low, high, scratch).mT
    return scores


def _scores_by_channel(
    rows: Tensor, planes: Planes, packing: Packing, begin: int, stop: int, scratch: Tensor
) -> Tensor:
    """Scores [B, H, rows, stop - begin] where 32 tokens of a channel share a scale: a small product for each 32."""
    first, last = begin // GROUP, -(-stop // GROUP)
    scale, minimum = _apart(planes.steps[:, :, first:last])
    scaled = rows.unsqueeze(2) * (scale * _units(packing)).unsqueeze(3)
    found = [
        scaled[:, :, low // GROUP - first : high // GROUP - first]
        @ _codes(planes, packing, low, high, scratch).unflatten(2, (-1, GROUP)).mT
        for low, high in _blocks(first * GROUP, last * GROUP)
    ]
    scores = torch.cat(found, 2).transpose(2, 3).contiguous().add_((rows @ minimum.mT).unsqueeze(-1)).flatten(3)
    return scores[..., begin - first * GROUP : stop - first * GROUP]


def _weigh(
    weights: Tensor, planes: Planes, packing: Packing, begin: int, stop: int, cut: int, scratch: Tensor
) -> Tensor:
    """The sum [B, H, rows, E] of values with weights [B, H, rows, stop - begin]."""
    middle = max(begin, min(stop, cut))
    packed = weights[..., : middle - begin]
    if packing.form == "per_token":
        scale, minimum = _steps(planes, begin, middle)
        result = _sum(packed * scale, planes, packing, begin, middle, scratch)
        return torch.addcmul((packed * minimum).sum(-1, keepdim=True), result, _units(packing))
    if weights.shape[2] <= FEW:
        result = _weigh_by_group(packed, planes, packing, begin, middle, scratch)
    else:
        result = weights.new_zeros(*weights.shape[:3], packing.head_dim)
        for low, high in _blocks(begin, middle):
            result += packed[..., low - begin : high - begin] @ _tokens(planes, packing, low, high, scratch)
    if middle < stop:
        result += weights[..., middle - begin :] @ _tail(planes, middle - cut, stop - cut)
    return result


def _weigh_by_group(
    weights: Tensor, planes: Planes, packing: Packing, begin: int, stop: int, scratch: Tensor
) -> Tensor:
    """The sum [B, H, rows, E] where 32 channels of a token share a scale: weights of their own for each 32 channels."""
    scale, minimum = _apart(planes.steps[:, :, begin:stop].transpose(2, 3))
    scaled = weights.unsqueeze(2) * scale.unsqueeze(3)
    result = _sum(scaled.flatten(2, 3), planes, packing, begin, stop, scratch)
    # Of the products of each group's weights with all channels, those with its own.
    own = result.unflatten(2, scaled.shape[2:4]).unflatten(-1, (-1, GROUP)).diagonal(dim1=2, dim2=4)
    least = (weights @ minimum.mT).repeat_interleave(GROUP, -1)
    return torch.addcmul(least, own.mT.flatten(3), _units(packing))


def _sum(weights: Tensor, planes: Planes, packing: Packing, begin: int, stop: int, scratch: Tensor) -> Tensor:
    """The sum [B, H, rows, E] of codes, over `_units`, with weights [B, H, rows, stop - begin]."""
    result = weights.new_zeros(*weights.shape[:3], packing.head_dim)
    for low, high in _blocks(begin, stop):
        result += weights[..., low - begin : high - begin] @ _codes(planes, packing, low, high, scratch)
    return result


def _blocks(begin: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens, of which all but the first start where tokens share steps."""
    low = begin
    while low < stop:
        high = min(low // GROUP * GROUP + TOKENS, stop)
        yield low, high
        low = high


def _tail(planes: Planes, low: int, high: int) -> Tensor:
    """Tokens of the tail as float32 [B, H, high - low, D]."""
    assert planes.tail is not None
    return planes.tail[:, :, low:high].float()


def _steps(planes: Planes, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum [B, H, 1, high - low] of tokens that are a group each."""
    return _apart(planes.steps[:, :, None, low:high, 0])


def _apart(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of steps [..., 2] as float32, each contiguous: strided, products with them take four times."""
    scale, minimum = steps.movedim(-1, 0).contiguous().float()
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


def _tokens(planes: Planes, packing: Packing, low: int, high: int, scratch: Tensor) -> Tensor:
    """Dequantized tokens as float32 [B, H, high - low, D], of forms where a group is not a whole token."""
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
