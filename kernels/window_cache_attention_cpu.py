"""``window_cache_attention`` on the CPU: two products with the stores as they lie, two with new tokens, one softmax.

No store is copied in float32, and queries go in blocks. A decoding step is one call of PyTorch's attention instead.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .window_cache import slots_before_sinks, window_of

QUERIES = 128
"""Queries of a block: what their scores cost in memory."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    positions: Tensor,
    sinks: int,
    scale: float,
    compensate: bool = True,
    starts: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """The arguments are the operator's, and checked."""
    batch, heads, count, dim = query.shape
    groups = key.shape[1]
    output = query.new_empty(batch, heads, count, value.shape[-1])
    if output.numel() == 0:
        return output
    first = int(positions[0])
    window = window_of(key.shape[2], sinks, key.dtype)
    columns = 1 + sinks + min(first, window)  # what was never written is not read
    stand = slots_before_sinks(key.dtype) - 1
    keys, values = (store[:, :, stand : stand + columns].float() for store in (key, value))
    if count == 1 and starts is None and slopes is None and query.dtype == torch.float32:
        row = _bias_of_one(first, window, sinks, columns, compensate)
        return _one_query(query, keys, values, new_key, new_value, scale, row)
    bias = _bias(first, window, sinks, columns, compensate, starts)
    new_keys, new_values = new_key.float(), new_value.float()
    lines = None if slopes is None else _lines(slopes, groups, first, count, window, sinks, columns, starts)
    for low in range(0, count, QUERIES):
        high = min(low + QUERIES, count)
        rows = query[:, :, low:high].float().mul(scale).reshape(batch, groups, -1, dim)
        old = rows @ keys.mT
        if isinstance(bias, Tensor):
            old += bias
        else:
            old[..., 0] += bias
        new = rows @ new_keys[:, :, :high].mT
        if lines is not None:
            for scores, line in ((old, lines[0]), (new, lines[1][..., :high])):
                scores.unflatten(2, (-1, high - low)).add_(line)
        if high > 1 or starts is not None:
            _hide(new.unflatten(2, (-1, high - low)), low, first, starts)
        scores = torch.cat([old, new], -1)
        weights = scores.softmax(-1)
        if starts is not None:
            weights.masked_fill_(scores.amax(-1, keepdim=True) == float("-inf"), 0.0)
        y = weights[..., :columns] @ values
        y += weights[..., columns:] @ new_values[:, :, :high]
        output[:, :, low:high] = y.view(batch, heads, high - low, -1)
    return output


def _one_query(
    query: Tensor, keys: Tensor, values: Tensor, new_key: Tensor, new_value: Tensor, scale: float, bias: Tensor
) -> Tensor:
    """A decoding step, in few calls: there they cost more than the arithmetic, and than copying what is seen."""
    rows = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
    keys, values = torch.cat([keys, new_key], 2), torch.cat([values, new_value], 2)
    output = scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    return output.reshape(*query.shape[:3], -1)


@lru_cache(maxsize=8)
def _bias_of_one(first: int, window: int, sinks: int, columns: int, compensate: bool) -> Tensor:
    """[1, 1, 1, columns + 1], of the stores' tokens and the new one; all layers of a step ask for the same."""
    bias = _bias(first, window, sinks, columns, compensate, None)
    row = torch.zeros(1, 1, 1, columns + 1)
    row[..., :-1] = bias if isinstance(bias, Tensor) else 0.0
    if not isinstance(bias, Tensor):
        row[..., 0] = bias
    return row


def _bias(first: int, window: int, sinks: int, columns: int, compensate: bool, starts: Tensor | None) -> Tensor | float:
    """What is added to the scores of the stores' tokens, [B or 1, 1, 1, columns]; a number where only the mean's is."""
    if starts is None and first >= window + sinks:
        return math.log(first - window - sinks) if compensate and first > window + sinks else float("-inf")
    begin = (torch.zeros(1, dtype=torch.int64) if starts is None else starts)[:, None]
    count = first - window - begin - sinks
    mean = torch.where(count > 0, count.clamp_min(1).float().log(), float("-inf"))
    if not compensate:
        mean = torch.full_like(mean, float("-inf"))
    sink_seen = begin + torch.arange(sinks) < first
    position = first - 1 - (first - 1 - torch.arange(columns - 1 - sinks)) % window
    seen = torch.cat([sink_seen, position >= begin + sinks], 1)
    return torch.cat([mean, torch.where(seen, 0.0, float("-inf"))], 1)[:, None, None]


def _lines(
    slopes: Tensor, groups: int, first: int, count: int, window: int, sinks: int, columns: int, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ALiBi's bias of the stores' tokens and of new ones, [B or 1, H, rows, 1, tokens], from position `first` on."""
    begin = (torch.zeros(1, dtype=torch.int64) if starts is None else starts)[:, None]
    sink = begin + torch.arange(sinks)
    ring = first - 1 - (first - 1 - torch.arange(columns - 1 - sinks)) % window
    # The mean has no position, and is hidden.
    old = torch.cat([torch.full_like(begin, first), sink, ring.expand(len(begin), -1)], 1) - first
    by_row = slopes.view(1, groups, -1, 1, 1)
    return by_row * old[:, None, None, None], by_row * torch.arange(count)


def _hide(scores: Tensor, low: int, first: int, starts: Tensor | None) -> None:
    """Hide later tokens and padding from queries `low`, `low` + 1, ... of scores [B, H, rows, queries, new tokens]."""
    i = torch.arange(low, low + scores.shape[-2])[:, None]
    j = torch.arange(scores.shape[-1])
    hidden = j > i
    if starts is not None:
        # Of padding queries the stores are hidden as well, by their bias: no start is after a token that is kept.
        hidden = hidden | (first + j < starts[:, None, None, None, None])
    scores.masked_fill_(hidden, float("-inf"))
