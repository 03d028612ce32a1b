"""The Triton kernels of `window_cache_attention`: stores and new tokens are one row of columns, split among programs.

A program takes the queries of one head of keys (all its query heads, so that tokens are read once for a group) and one
part of the columns: first the store's as they lie (the mean with the logarithm of its count as bias, sinks, ring), then
the new tokens. It keeps a running maximum and sum (online softmax). For a token or two the columns are split, each part
stays unnormalised, and a second kernel weighs the parts; with enough queries to fill the device a program takes all
columns and writes the result. What a store holds follows from the first position, which is read on the device, so a
decode step is one static graph; what was never written is not read.

Products of 16-bit tensors run on the matrix units, for which weights are rounded to the tensors' dtype.

Source of the split: Flash-Decoding (Dao et al. 2023).
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .split_softmax_triton import launch_join, parts_for, softmax_step
from .window_cache import slots_before_sinks, window_of

_jit: Callable[..., Any] = triton.jit


class Blocks(NamedTuple):
    """How a program of the first kernel is cut: queries of a head of keys, tokens at a time, and launch options."""

    rows: int
    tokens: int
    warps: int
    stages: int


def launch(
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
) -> Tensor:
    """Attend, arguments unchecked, on the query's device (the CPU under TRITON_INTERPRET=1)."""
    batch, query_heads, count, dim = query.shape
    heads, slots, width = value.shape[1:]
    y = query.new_empty(batch, query_heads, count, width)
    if y.numel() == 0:
        return y
    group = query_heads // heads
    rows, window = count * group, window_of(slots, sinks, key.dtype)
    cut = choose_blocks(rows, max(dim, width), query.dtype)
    blocks = -(-rows // cut.rows)
    splits = choose_splits(batch * heads * blocks, 1 + sinks + window + count, cut.tokens)
    part, peak, total = parts_for(batch * heads, splits, rows, width, query.device) if splits > 1 else (y, y, y)
    _part_kernel[(batch * heads, blocks, splits)](
        query.contiguous(), key.contiguous(), value.contiguous(), new_key.contiguous(), new_value.contiguous(),
        positions, positions if starts is None else starts, part, peak, total,
        scale, count, group, heads, sinks, window, splits,
        DIM=dim, WIDTH=width, LEAD=slots_before_sinks(key.dtype), BLOCK_R=cut.rows, BLOCK_T=cut.tokens,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_E=max(16, triton.next_power_of_2(width)),
        COMPENSATE=compensate, PADDED=starts is not None, SPLIT=splits > 1,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if splits > 1:
        launch_join(part, peak, total, y)
    return y


def choose_blocks(rows: int, channels: int, dtype: torch.dtype) -> Blocks:
    """For so many rows: what compiles without spills, and within the shared memory of the smallest device (sm_89).

    float32 has no matrix units here and fills the registers soon; 16-bit heads of 64 channels spill with 64 by 64.
    """
    if dtype == torch.float32:
        return Blocks(16, 16, 4 if channels <= 128 else 8, 2)
    if rows > 16 and channels <= 256:
        return Blocks(32, 32, 4 if channels <= 128 else 8, 2)
    return Blocks(8 if rows <= 8 else 16, 64 if channels <= 256 else 32, 4, 2)


def choose_splits(programs: int, columns: int, tokens: int) -> int:
    """Parts of the columns: enough programs for about two a multiprocessor of a large GPU (132), of two blocks each."""
    return max(1, min(-(-264 // programs), -(-columns // (2 * tokens)), 64))


@_jit
def _absorb(
    q, key, value, slot, ok, bias, seen, scale, most, weight, result,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The running softmax after the tokens in `slot` that are `ok`, of which each row has `seen` some.

    Tokens are the rows of both products, and queries their columns: of those a step has few, and tensor cores take
    eight columns but sixteen rows.
    """
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k = tl.load(key + slot[:, None] * DIM + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
    s = tl.dot(k, q, input_precision="ieee") * scale + bias[:, None]
    s = tl.where(seen, s, float("-inf"))
    p, shrink, most = softmax_step(s, most, 0)
    weight = weight * shrink + tl.sum(p, 0)
    v = tl.load(value + slot[None, :] * WIDTH + e[:, None], mask=ok[None, :] & (e < WIDTH)[:, None], other=0.0)
    result = tl.dot(v, p.to(v.dtype), result * shrink[None, :], input_precision="ieee")
    return most, weight, result


@_jit
def _part_kernel(
    query, key, value, new_key, new_value, positions, starts, part, peak, total,
    scale, count, group, heads, sinks, window, splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, LEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, COMPENSATE: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Row r of a head is query r // group of its query head r % group: a program's queries are neighbours."""
    head, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = count * group
    number = row // group
    # Offsets in a head fit 32 bits; as 64 they would fill the registers.
    first = tl.load(positions).to(tl.int32)
    begin = 0
    if PADDED:
        begin = tl.load(starts + head // heads).to(tl.int32)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    place = (head * group + row % group) * count + number
    q = tl.load(query + place[None, :] * DIM + d[:, None], mask=(row < rows)[None, :] & (d < DIM)[:, None], other=0.0)
    # The columns of the store that were written, then the new tokens from the first that is no padding.
    held = tl.where(first > 0, 1 + sinks + tl.minimum(first, window), 0)
    skip = tl.minimum(tl.maximum(begin - first, 0), count)
    stop = tl.minimum((block * BLOCK_R + BLOCK_R - 1) // group, count - 1) + 1
    share = tl.cdiv(tl.cdiv(held + tl.maximum(stop - skip, 0), splits), BLOCK_T) * BLOCK_T
    low = split * share
    key += head * (LEAD + sinks + window) * DIM + (LEAD - 1) * DIM
    value += head * (LEAD + sinks + window) * WIDTH + (LEAD - 1) * WIDTH
    new_key += head * count * DIM
    new_value += head * count * WIDTH
    gone = first - window - begin - sinks
    weigh = tl.log(tl.maximum(gone, 1).to(tl.float32))
    most = tl.full([BLOCK_R], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)
    result = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    for start in range(low, tl.minimum(low + share, held), BLOCK_T):
        c = start + tl.arange(0, BLOCK_T)
        # The newest token of a ring's slot: positions before `first` fall back from it by the window.
        position = first - 1 - (first - c + sinks) % window
        kept = (c > sinks) & (c < held) & (position >= begin + sinks)
        kept = kept | ((c > 0) & (c <= sinks) & (begin + c <= first))
        if COMPENSATE:
            kept = kept | ((c == 0) & (gone > 0))
        seen = kept[:, None] & (row < rows)[None, :]
        most, weight, result = _absorb(
            q, key, value, c, kept, tl.where(c == 0, weigh, 0.0), seen, scale, most, weight, result,
            DIM, WIDTH, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    for start in range(tl.maximum(low - held, 0) + skip, tl.minimum(low + share - held + skip, stop), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        # Of the last block of this share, what is the next share's is not taken.
        mine = t < tl.minimum(low + share - held + skip, stop)
        seen = mine[:, None] & (t[:, None] <= number[None, :]) & (row < rows)[None, :]
        most, weight, result = _absorb(
            q, new_key, new_value, t, mine, tl.zeros([BLOCK_T], tl.float32), seen, scale, most, weight, result,
            DIM, WIDTH, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    inside = (row < rows)[None, :] & (e < WIDTH)[:, None]
    if SPLIT:
        place = (head * splits + split) * rows + row
        tl.store(peak + place, most, mask=row < rows)
        tl.store(total + place, weight, mask=row < rows)
    else:
        # A query in the padding saw nothing: no weight, and a result of zero.
        result = result / tl.where(weight == 0.0, 1.0, weight)[None, :]
    tl.store(part + place[None, :] * WIDTH + e[:, None], result.to(part.dtype.element_ty), mask=inside)
