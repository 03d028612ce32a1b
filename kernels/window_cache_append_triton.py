"""The Triton kernels of `window_cache_append`: one for a single token, two for a piece.

A single token is one program a head: what it pushes out of the ring goes to the mean, then it takes that place. For a
piece the sum of what leaves the ring is split among programs, and only when all have read do others write the ring, the
sinks and the mean. Where the new tokens belong is read on the device, so a decode step is one static graph; no sum is
atomic, so the same tokens give the same bits.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .window_cache import slots_before_sinks, window_of

_jit: Callable[..., Any] = triton.jit
_ELEMENTS = 4096
"""Tokens times channels that a program of a piece takes at a time: 32 sums a thread."""


def block_tokens(dim: int) -> int:
    """Tokens that a program of a piece takes at a time."""
    return max(_ELEMENTS // max(int(triton.next_power_of_2(dim)), 64), 1)


def launch(store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None) -> Tensor:
    """Append in place, arguments unchecked, on the store's device (the CPU under TRITON_INTERPRET=1)."""
    batch, heads, count, dim = new.shape
    if new.numel() == 0:
        return store
    if not store.is_contiguous():
        return store.copy_(launch(store.contiguous(), positions, new, sinks, starts))
    new = new.contiguous()
    slots, programs = store.shape[2], batch * heads
    window = window_of(slots, sinks, store.dtype)
    sizes = {
        "DIM": dim, "LEAD": slots_before_sinks(store.dtype), "BLOCK_D": triton.next_power_of_2(dim),
        "PADDED": starts is not None,
    }  # fmt: skip
    mean, begins = store.view(torch.float32), positions if starts is None else starts
    if count == 1:
        _step_kernel[(programs,)](store, mean, new, positions, begins, heads, sinks, window, **sizes, num_warps=1)
        return store
    block_t = block_tokens(dim)
    splits = choose_splits(programs, count, block_t)
    part = torch.empty(programs, splits, dim, dtype=torch.float32, device=store.device)
    _leaving_kernel[(programs, splits)](
        store, new, positions, begins, part, count, heads, sinks, window, splits, **sizes, BLOCK_T=block_t, num_warps=4
    )
    # Whatever the first position, so many blocks hold the tokens that stay, and the sinks.
    blocks = triton.cdiv(max(min(count, window), min(count, sinks)), block_t)
    _write_kernel[(programs, blocks)](
        store, mean, new, positions, begins, part, count, heads, sinks, window, splits, **sizes, BLOCK_T=block_t,
        num_warps=4,
    )  # fmt: skip
    return store


def choose_splits(programs: int, count: int, tokens: int) -> int:
    """Parts of a piece: enough programs for about two a multiprocessor of a large GPU (132), of four blocks each."""
    return max(1, min(-(-264 // programs), -(-count // (4 * tokens)), 32))


@_jit
def _begin(starts, head, heads, PADDED: tl.constexpr):
    """Where the sequence of a head begins."""
    begin = 0
    if PADDED:
        begin = tl.load(starts + head // heads).to(tl.int32)
    return begin


@_jit
def _step_kernel(
    store, mean, new, positions, starts, heads, sinks, window,
    DIM: tl.constexpr, LEAD: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One token: read its place in the ring, move the mean by what was there, write."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < DIM
    # Offsets in a head fit 32 bits.
    at = tl.load(positions).to(tl.int32)
    begin = _begin(starts, head, heads, PADDED)
    base = store + head * (LEAD + sinks + window) * DIM
    ring = base + (LEAD + sinks + at % window) * DIM + d
    # Of a 16-bit store two elements are one of the mean.
    mean += head * (LEAD + sinks + window) * DIM // (1 if LEAD == 1 else 2) + d
    token = tl.load(new + head * DIM + d, mask=inside, other=0.0)
    number = at + 1 - window - begin - sinks
    gone = inside & (number > 0)
    leaving = tl.load(ring, mask=gone, other=0.0).to(tl.float32)
    before = tl.load(mean, mask=gone & (number > 1), other=0.0)
    after = before + tl.div_rn(leaving - before, tl.full(before.shape, 1.0, tl.float32) * tl.maximum(number, 1))
    # A thread may write where another has yet to read.
    tl.debug_barrier()
    tl.store(mean, after, mask=gone)
    if LEAD > 1:
        tl.store(base + (LEAD - 1) * DIM + d, after.to(token.dtype), mask=gone)
    tl.store(ring, token, mask=inside)
    sink = at - begin
    tl.store(base + (LEAD + sink) * DIM + d, token, mask=inside & (sink >= 0) & (sink < sinks))


@_jit
def _leaving_kernel(
    store, new, positions, starts, part, count, heads, sinks, window, splits,
    DIM: tl.constexpr, LEAD: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The sum of a share of the tokens that leave the ring: older ones lie there, others come and go with the piece."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(positions).to(tl.int32)
    begin = _begin(starts, head, heads, PADDED)
    stop = first + count - window
    start = tl.maximum(tl.maximum(begin + sinks, first - window), 0)
    share = tl.cdiv(tl.maximum(stop - start, 0), splits)
    low = start + split * share
    high = tl.minimum(low + share, stop)
    d = tl.arange(0, BLOCK_D)
    ring = store + (head * (LEAD + sinks + window) + LEAD + sinks) * DIM
    new += head * count * DIM
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for at in range(low, tl.minimum(high, first), BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        mask = (t < tl.minimum(high, first))[:, None] & (d < DIM)[None, :]
        total += tl.load(ring + (t % window)[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)
    for at in range(tl.maximum(low, first), high, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        mask = (t < high)[:, None] & (d < DIM)[None, :]
        total += tl.load(new + (t - first)[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(part + (head * splits + split) * DIM + d, tl.sum(total, 0), mask=d < DIM)


@_jit
def _write_kernel(
    store, mean, new, positions, starts, part, count, heads, sinks, window, splits,
    DIM: tl.constexpr, LEAD: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A block of the tokens that stay in the ring, and a block of new sinks; the first program writes the mean too."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(positions).to(tl.int32)
    begin = _begin(starts, head, heads, PADDED)
    stop = first + count
    d = tl.arange(0, BLOCK_D)
    inside = (d < DIM)[None, :]
    base = store + head * (LEAD + sinks + window) * DIM
    new += head * count * DIM
    t = tl.maximum(first, stop - window) + block * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (t < stop)[:, None] & inside
    x = tl.load(new + (t - first)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    tl.store(base + (LEAD + sinks + t % window)[:, None] * DIM + d[None, :], x, mask=mask)
    t = tl.maximum(first, begin) + block * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (t < tl.minimum(stop, begin + sinks))[:, None] & inside
    x = tl.load(new + (t - first)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    tl.store(base + (LEAD + t - begin)[:, None] * DIM + d[None, :], x, mask=mask)
    after = stop - window - begin - sinks
    if (block == 0) & (after > 0):
        before = tl.maximum(first - window - begin - sinks, 0)
        total = tl.zeros([BLOCK_D], tl.float32)
        for split in range(splits):
            total += tl.load(part + (head * splits + split) * DIM + d, mask=d < DIM, other=0.0)
        place = mean + head * (LEAD + sinks + window) * DIM // (1 if LEAD == 1 else 2) + d
        old = tl.load(place, mask=(d < DIM) & (before > 0), other=0.0)
        # Shares in float32: their error is the mean's own rounding, however many tokens there are.
        value = old * (before.to(tl.float32) / after) + total / after
        tl.debug_barrier()
        tl.store(place, value, mask=d < DIM)
        if LEAD > 1:
            tl.store(base + (LEAD - 1) * DIM + d, value.to(x.dtype), mask=d < DIM)
