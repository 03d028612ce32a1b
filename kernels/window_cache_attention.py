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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .window_cache import dropped, parts, refuse_slots, window_of
from .window_cache_attention_cpu import attend

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


class _Call(NamedTuple):
    """The operator's arguments, as they are handed to its kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    new_key: Tensor
    new_value: Tensor
    positions: Tensor
    sinks: int
    scale: float
    compensate: bool = True
    starts: Tensor | None = None
    slopes: Tensor | None = None

    def require(self, proved: bool = True) -> None:
        """Check all arguments."""
        tensors = (getattr(self, name) for name in CONTRACT.arguments)
        _require(*tensors, sinks=self.sinks, compensate=self.compensate, proved=proved)


@window_cache_attention.register_fake
def _fake(*arguments: Any, **named: Any) -> Tensor:
    call = _Call(*arguments, **named)
    call.require(proved=False)
    return call.query.new_empty((*call.query.shape[:3], call.value.shape[-1]))


def _cpu(*arguments: Any) -> Tensor:
    """See ``window_cache_attention_cpu.py``."""
    _Call(*arguments).require()
    return attend(*arguments)


def _cuda(*arguments: Any) -> Tensor:
    """The Triton kernels; positions are not looked at, since reading them would wait for the device."""
    call = _Call(*arguments)
    if call.slopes is not None:
        reason = "the Triton kernel takes no slopes, so models with ALiBi run on the CPU"
        raise missing_kernel(CONTRACT.operator, call.query.device, reason)
    with CONTRACT.on_cuda(call.query.device):
        from .window_cache_attention_triton import launch

        call.require()
        return launch(*call[:-1])


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
