"""Attention of new queries to a windowed key-value cache and to the new tokens themselves.

    y[i] = sum_j softmax_j(scale q[i] . k[j] + bias[j]) v[j]

over the tokens that the stores held *before this call* (the mean of the dropped ones, with bias log dropped(f), the
sinks, and the ring), and the call's own tokens up to the query's, f to positions[i]. A single new token so sees the
last R tokens before it, and itself; a query of a longer piece also sees what entered the piece before it, and no token
that it would see when decoded one by one is hidden from it. Append after attending (``window_cache_append.py``).

Shapes: query ``[B, Hq, T, D]``; key and value stores ``[B, H, S, D]`` and ``[B, H, S, E]`` (``window_cache.py``), H
divides Hq, and query head h reads head ``h H // Hq``; new_key ``[B, H, T, D]`` and new_value ``[B, H, T, E]``;
positions ``[T]``, consecutive; y ``[B, Hq, T, E]``. Dtypes: float32, float16 or bfloat16, one for all; positions and
starts int64. ``starts`` ``[B]`` is where each sequence begins, 0 if not given: what lies before is padding, and a query
there, which sees nothing, gives zero. Without ``compensate`` the dropped tokens have no stand-in.

``slopes`` ``[Hq]``, float32, are ALiBi's: the bias of the token at position p is then slope[h] (p - position of the
query), for sinks, ring and new tokens. (Any other zero point, as Bloom's slope[h] p, gives the same y.) The mean stands
for tokens of many positions, and what the method drops there is what no query sees any more; so slopes exclude
``compensate``. On CUDA there is no kernel with slopes yet.

By Jensen's inequality n exp(q . mean k) <= sum exp(q . k), so the mean never weighs more than what it stands for; it is
exact where the dropped keys are equal. Kernels differ from the reference by float32 rounding of sums of D and of the
seen tokens' terms; with 16-bit tensors the Triton kernel also rounds weights to their dtype. What was never written
must be finite.

Source: RazorAttention (Tang et al. 2024, arXiv 2407.15891), algorithm 1; section 3.1 for ALiBi.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .window_cache import dropped, parts, refuse_slots, slots_before_sinks, window_of

CONTRACT = Contract(
    "window_cache_attention",
    {
        "query": Argument("B Q T D", FLOATS),
        "key": Argument("B H S D", FLOATS),
        "value": Argument("B H S E", FLOATS),
        "new_key": Argument("B H T D", FLOATS),
        "new_value": Argument("B H T E", FLOATS),
        "positions": Argument("T", (torch.int64,)),
        "starts": Argument("B", (torch.int64,), optional=True),
        "slopes": Argument("Q", (torch.float32,), optional=True),
    },
    sizes={
        "Q": Size(minimum=1, multiple_of="H"),
        "D": Size(minimum=8, multiple_of=8),
        "E": Size(minimum=8, multiple_of=8),
        "sinks": Size(minimum=0),
    },
)

QUERIES = 128
"""Queries of a block on the CPU: what their scores cost in memory."""


def reference(
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
    """The formula: all tokens that are kept, side by side, one softmax."""
    batch, heads, count, _ = query.shape
    repeats = heads // key.shape[1]
    window = window_of(key.shape[2], sinks, key.dtype)
    keys = torch.cat([parts(key, sinks).seen, new_key], 2).float().repeat_interleave(repeats, 1)
    values = torch.cat([parts(value, sinks).seen, new_value], 2).float().repeat_interleave(repeats, 1)
    bias = torch.full((batch, 1, count, keys.shape[2]), float("-inf"), device=query.device)
    at = torch.zeros(batch, keys.shape[2])  # the position of each token
    first = int(positions[0]) if count else 0
    at[:, 1 + sinks + window :] = torch.arange(first, first + count)
    for row, begin in enumerate([0] * batch if starts is None else starts.tolist()):
        if compensate and (n := dropped(first, window, sinks, begin)):
            bias[row, ..., 0] = math.log(n)
        for sink in range(sinks):
            if begin + sink < first:
                bias[row, ..., 1 + sink] = 0.0
                at[row, 1 + sink] = begin + sink
        for position in range(max(0, first - window, begin + sinks), first):
            bias[row, ..., 1 + sinks + position % window] = 0.0
            at[row, 1 + sinks + position % window] = position
        for i in range(count):
            bias[row, 0, i, 1 + sinks + window + max(begin - first, 0) : 1 + sinks + window + i + 1] = 0.0
    if slopes is not None:
        away = at[:, None].to(query.device) - positions[:, None]
        bias = bias + slopes[:, None, None] * away[:, None]
    weights = (query.float() @ keys.mT * scale + bias).softmax(-1)
    # A query in the padding sees nothing at all.
    weights = weights.masked_fill((bias == float("-inf")).all(-1, keepdim=True), 0.0)
    return (weights @ values).to(query.dtype)


@torch.library.custom_op("graphwright::window_cache_attention", mutates_args=())
def window_cache_attention(
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
    """Attention of queries ``[B, Hq, T, D]`` to what windowed stores held, and to the new tokens, to ``[B, Hq, T, E]``.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold, stores without a ring or of different ones.
        MissingKernel: No kernel for the query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


@window_cache_attention.register_fake
def _fake(
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
    _require(
        query,
        key,
        value,
        new_key,
        new_value,
        positions,
        starts,
        slopes,
        sinks=sinks,
        compensate=compensate,
        proved=False,
    )
    return query.new_empty((*query.shape[:3], value.shape[-1]))


def _cpu(
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
    """Two products with the stores as they lie, two with the new tokens, one softmax; no store is copied in float32."""
    _require(query, key, value, new_key, new_value, positions, starts, slopes, sinks=sinks, compensate=compensate)
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
    rows = query.view(query.shape[0], keys.shape[1], -1, query.shape[3])
    keys, values = torch.cat([keys, new_key], 2), torch.cat([values, new_value], 2)
    output = scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    return output.view(*query.shape[:3], -1)


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


def _cuda(
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
    """The Triton kernels; positions are not looked at, since reading them would wait for the device."""
    if slopes is not None:
        reason = "the Triton kernel takes no slopes, so models with ALiBi run on the CPU"
        raise missing_kernel(CONTRACT.operator, query.device, reason)
    with CONTRACT.on_cuda(query.device):
        from .window_cache_attention_triton import launch

        _require(query, key, value, new_key, new_value, positions, starts, slopes, sinks=sinks, compensate=compensate)
        return launch(query, key, value, new_key, new_value, positions, sinks, scale, compensate, starts)


def _wrong(arguments: Mapping[str, Any]) -> str | None:
    key = arguments["key"]
    if (reason := refuse_slots(key.shape[2], arguments["sinks"], key.dtype)) is not None:
        return reason
    tensors = ("query", "key", "value", "new_key", "new_value")
    if len({arguments[name].dtype for name in tensors}) > 1:
        return "got tensors of different dtypes, expected one for query, stores and new tokens"
    if arguments["slopes"] is not None and arguments["compensate"]:
        return "got slopes and compensate, expected compensate=False: the mean of dropped tokens has no position"
    return None


_require = CONTRACT.requirement(_wrong)

torch.library.impl("graphwright::window_cache_attention", "cpu", _cpu)
torch.library.impl("graphwright::window_cache_attention", "cuda", _cuda)
register(torch.ops.graphwright.window_cache_attention.default, reference, CONTRACT)
