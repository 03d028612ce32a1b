"""Append new tokens to one half of a windowed key-value cache: the oldest leave the ring for the mean.

    ring[p mod R]  = new token at p           for the last R of the new positions p
    sinks[p - s]   = new token at p           for p - s < N0,  s = starts, where the sequence begins
    mean'          = (n mean + sum leaving) / (n + m)     over the m tokens that leave the ring, sinks left out

Shapes: store ``[B, H, S, D]`` (``window_cache.py`` has its parts); positions ``[T]``, consecutive; new
``[B, H, T, D]``; starts ``[B]``, 0 if not given: what lies before is padding, which is neither a sink nor in the mean.
Dtypes: store and new float32, float16 or bfloat16, positions and starts int64.

Appending tokens one by one, in pieces or at once gives the same sinks and the same ring, and the same mean up to
float32 rounding. Positions have to follow on those written before, or start at 0.

``window_cache_append_`` does it in place; lowering puts it where nobody reads the old store any more.

Source: ``window_cache.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .window_cache import Parts, dropped, parts, refuse_slots

CONTRACT = Contract(
    "window_cache_append",
    {
        "store": Argument("B H S D", FLOATS),
        "positions": Argument("T", (torch.int64,)),
        "new": Argument("B H T D", FLOATS),
        "starts": Argument("B", (torch.int64,), optional=True),
    },
    sizes={"D": Size(minimum=8, multiple_of=8), "sinks": Size(minimum=0)},
)


def reference(store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None) -> Tensor:
    """The store after the tokens were appended, one after the other."""
    store = store.clone()
    begins = [0] * len(store) if starts is None else starts.tolist()
    for step, position in enumerate(positions.tolist()):
        for row, begin in enumerate(begins):
            mean, stand, first, ring, _ = (part[row] for part in parts(store, sinks))
            window, token = ring.shape[1], new[row, :, step]
            slot = position % window
            count = dropped(position + 1, window, sinks, begin)
            if count > 0:
                before = mean if count > 1 else torch.zeros_like(mean)
                mean.copy_(before + (ring[:, slot].float() - before) / count)
                stand.copy_(mean)
            ring[:, slot] = token
            if 0 <= position - begin < sinks:
                first[:, position - begin] = token
    return store


@torch.library.custom_op("graphwright::window_cache_append", mutates_args=())
def window_cache_append(
    store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None
) -> Tensor:
    """The store ``[B, H, S, D]`` with tokens ``[B, H, T, D]`` written at positions ``[T]``.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold, a store without a ring, a negative position.
        MissingKernel: No kernel for the store's device.
    """
    raise missing_kernel(CONTRACT.operator, store.device)


@window_cache_append.register_fake
def _fake(store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None) -> Tensor:
    _require(store, positions, new, starts, sinks=sinks, proved=False)
    return torch.empty_like(store)


def append(store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None) -> Tensor:
    """Append in place on the CPU, and return the store."""
    _require(store, positions, new, starts, sinks=sinks)
    count = new.shape[2]
    if count == 0:
        return store
    first = int(positions[0])
    if first < 0:
        raise InvalidArgument(f"{CONTRACT.operator}: got position {first}, expected none below 0")
    whole = parts(store, sinks)
    window = whole.ring.shape[2]
    stop = first + count
    rows = [(slice(None), 0)] if starts is None else [(slice(b, b + 1), s) for b, s in enumerate(starts.tolist())]
    for row, begin in rows:
        of = Parts(*(part[row] for part in whole)) if starts is not None else whole
        _drop(of, new[row], first, stop, begin)
        low, high = max(first, begin), min(stop, begin + sinks)
        if low < high:
            of.sinks[:, :, low - begin : high - begin] = new[row, :, low - first : high - first]
    kept = max(first, stop - window)
    slot, left = kept % window, window - kept % window
    recent = new[:, :, kept - first :]
    whole.ring[:, :, slot : slot + stop - kept] = recent[:, :, :left]
    if stop - kept > left:
        whole.ring[:, :, : stop - kept - left] = recent[:, :, left:]
    return store


def _drop(of: Parts, new: Tensor, first: int, stop: int, begin: int) -> None:
    """Take into the mean what leaves the ring when positions `first` to `stop` - 1 come, before they are written."""
    window, sinks = of.ring.shape[2], of.sinks.shape[2]
    low, high = max(begin + sinks, first - window, 0), stop - window
    if low >= high:
        return
    after = dropped(stop, window, sinks, begin)
    before = after - (high - low)
    if high - low == 1 and low < first:
        leaving = of.ring[:, :, low % window].float()
    else:
        leaving = new[:, :, max(low - first, 0) : max(high - first, 0)].float().sum(2)
        if low < first:
            slots = torch.arange(low, min(high, first)) % window
            leaving += of.ring[:, :, slots].float().sum(2)
    if before:
        of.mean.mul_(before / after).add_(leaving, alpha=1 / after)
    else:
        of.mean.copy_(leaving / after)
    if of.stand.dtype != of.mean.dtype:
        of.stand.copy_(of.mean)


def _cpu(store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None) -> Tensor:
    return append(store.clone(), positions, new, sinks, starts)


def _cuda(store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None) -> Tensor:
    return _cuda_in_place(store.clone(), positions, new, sinks, starts)


def _cuda_in_place(store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None) -> Tensor:
    """The Triton kernel; positions are not looked at, since reading them would wait for the device."""
    with CONTRACT.on_cuda(store.device):
        from .window_cache_append_triton import launch

        _require(store, positions, new, starts, sinks=sinks)
        return launch(store, positions, new, sinks, starts)


def _wrong(arguments: Mapping[str, Any]) -> str | None:
    store, new = arguments["store"], arguments["new"]
    if (reason := refuse_slots(store.shape[2], arguments["sinks"], store.dtype)) is not None:
        return reason
    return None if new.dtype == store.dtype else f"got new of {new.dtype}, expected {store.dtype} as the store"


_require = CONTRACT.requirement(_wrong)

# Not custom_op: the in-place twin returns its argument, as aten's do, so that it can take the place of a value.
torch.library.define(
    "graphwright::window_cache_append_",
    "(Tensor(a!) store, Tensor positions, Tensor new, int sinks, Tensor? starts=None) -> Tensor(a!)",
)
torch.library.impl("graphwright::window_cache_append_", "cpu", append)
torch.library.impl("graphwright::window_cache_append_", "cuda", _cuda_in_place)
torch.library.impl("graphwright::window_cache_append", "cpu", _cpu)
torch.library.impl("graphwright::window_cache_append", "cuda", _cuda)
register(torch.ops.graphwright.window_cache_append.default, reference, CONTRACT)
