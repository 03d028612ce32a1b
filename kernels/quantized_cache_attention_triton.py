"""The Triton kernels of `quantized_cache_attention`: the keys of a head are split among programs, then put together.

A program takes the queries of one head of keys (all its query heads, so that bytes are read once for a group) and one
part of the tokens. It unpacks codes in registers, keeps a running maximum and sum (online softmax), and leaves its part
unnormalised; a second kernel weighs the parts. Where the tokens end is read on the device, so a decode step is one
static graph. For several new tokens, as in an extension of the cache, the same kernels take blocks of queries.

Imported where there is Triton only. Source of the split: Flash-Decoding (Dao et al. 2023).
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .cache_append_triton import FORM_NUMBERS
from .packed_cache import Packing, packings
from .split_softmax_triton import launch_join, parts_for, softmax_step

_jit: Callable[..., Any] = triton.jit
BLOCK_T = 32
"""Tokens that a program unpacks at a time: with 64, heads of 128 channels spill registers on sm_80."""


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    key_bits: int,
    value_bits: int,
    mode: str,
    value_dim: int,
    scale: float,
    window: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """Attend, arguments unchecked, on the query's device (the CPU under TRITON_INTERPRET=1)."""
    batch, query_heads, count, dim = query.shape
    heads, width = key.shape[1], value_dim
    keys_as, values_as = packings(mode, key_bits, value_bits, dim, value_dim)
    y = query.new_empty(batch, query_heads, count, width)
    if y.numel() == 0:
        return y
    rows = count * query_heads // heads
    block_r = max(16, min(64, 1 << (rows - 1).bit_length()))
    blocks = -(-rows // block_r)
    splits = choose_splits(batch * heads * blocks, keys_as.capacity(key.shape[-1]))
    part, peak, total = parts_for(batch * heads, splits, rows, width, query.device)
    (k_codes, k_steps, k_tail), (v_codes, v_steps, v_tail) = _pointers(key, keys_as), _pointers(value, values_as)
    sizes = {
        "DIM": dim, "WIDTH": width, "KEY_BITS": keys_as.bits, "VALUE_BITS": values_as.bits,
        "KEY_FORM": FORM_NUMBERS[keys_as.form], "VALUE_FORM": FORM_NUMBERS[values_as.form],
        "BLOCK_R": block_r, "BLOCK_T": BLOCK_T, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_E": max(16, triton.next_power_of_2(width)), "PADDED": starts is not None,
    }  # fmt: skip
    _part_kernel[(batch * heads, blocks, splits)](
        query.contiguous(), k_codes, k_steps, k_tail, v_codes, v_steps, v_tail, positions,
        positions if starts is None else starts, part, peak, total,
        scale, count, window, query_heads // heads, heads, key.shape[-1], value.shape[-1], splits, **sizes,
        num_warps=warps_for(block_r), num_stages=2,
    )  # fmt: skip
    launch_join(part, peak, total, y)
    return y


def warps_for(block_r: int) -> int:
    """Warps of a program: 64 rows of 128 channels spill registers with 4."""
    return 4 if block_r <= 16 else 8


def choose_splits(programs: int, tokens: int) -> int:
    """Parts of the tokens: enough programs for about two a multiprocessor of a large GPU (132), of four blocks each."""
    return max(1, min(-(-264 // programs), -(-tokens // (4 * BLOCK_T)), 64))


def _pointers(store: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    planes = packing.planes(store)
    return planes.codes, planes.steps, planes.steps if planes.tail is None else planes.tail


@_jit
def _codes(codes, t, ok, DIM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The codes of tokens `t`, int32 [tokens, BLOCK]; zero where not `ok`."""
    ROW: tl.constexpr = DIM * BITS // 8
    channel = tl.arange(0, BLOCK)
    mask = ok[:, None] & (channel < DIM)[None, :]
    byte = tl.load(codes + t[:, None] * ROW + (channel % ROW)[None, :], mask=mask, other=0).to(tl.int32)
    return (byte >> (channel // ROW * BITS)[None, :]) & (2**BITS - 1)


@_jit
def _centered(codes, steps, t, ok, dtype: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of one group each: whole numbers around zero, exact in 16 bits, and each token's scale and middle.

    A token is numbers * scale + middle: products are made of the numbers alone, and take scale and middle once.
    """
    HALF: tl.constexpr = 2 ** (BITS - 1)
    numbers = (_codes(codes, t, ok, DIM, BITS, BLOCK) - HALF).to(tl.float32).to(dtype)
    scale = tl.load(steps + 2 * t, mask=ok, other=0.0).to(tl.float32)
    middle = tl.load(steps + 2 * t + 1, mask=ok, other=0.0).to(tl.float32) + HALF * scale
    return numbers, scale, middle


@_jit
def _tokens(
    codes, steps, tail, t, ok, cut,
    DIM: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens `t` of KIVI's forms as float32 [tokens, BLOCK]; zero where not `ok`."""
    channel = tl.arange(0, BLOCK)
    mask = ok[:, None] & (channel < DIM)[None, :]
    code = _codes(codes, t, ok, DIM, BITS, BLOCK)
    if FORM == 1:
        place = (t // 32 * DIM)[:, None] + channel[None, :]
    else:
        place = (t * (DIM // 32))[:, None] + (channel // 32)[None, :]
    scale = tl.load(steps + 2 * place, mask=mask, other=0.0).to(tl.float32)
    low = tl.load(steps + 2 * place + 1, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, code.to(tl.float32) * scale + low, 0.0)
    late = mask & (t >= cut)[:, None]
    kept = tl.load(tail + (t - cut)[:, None] * DIM + channel[None, :], mask=late, other=0.0)
    return tl.where(late, kept.to(tl.float32), x)


@_jit
def _part_kernel(
    query, k_codes, k_steps, k_tail, v_codes, v_steps, v_tail, positions, starts, part, peak, total,
    scale, count, window, group, heads, key_size, value_size, splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_FORM: tl.constexpr, VALUE_FORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Row r of a head is query r // group of its query head r % group: a program's queries are neighbours."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = count * group
    # Offsets in a head fit 32 bits; as 64 they would fill the registers.
    first = tl.load(positions).to(tl.int32)
    cut = (first + count - 1) // 32 * 32
    at = first + row // group
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    place = (head * group + row % group) * count + row // group
    q_mask = (row < rows)[:, None] & (d < DIM)[None, :]
    q = tl.load(query + place[:, None] * DIM + d[None, :], mask=q_mask, other=0.0)
    q_sum = tl.sum(q.to(tl.float32), 1)
    begin = 0
    if window > 0:
        begin = tl.maximum(first + tl.program_id(1) * BLOCK_R // group - window + 1, begin)
    if PADDED:
        begin = tl.maximum(tl.load(starts + head // heads).to(tl.int32), begin)
    end = first + tl.minimum((tl.program_id(1) * BLOCK_R + BLOCK_R - 1) // group, count - 1) + 1
    share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_T) * BLOCK_T
    low = begin + split * share
    high = tl.minimum(low + share, end)
    k_codes += head * key_size
    k_steps += head * (key_size // 2)
    k_tail += head * (key_size // 2)
    v_codes += head * value_size
    v_steps += head * (value_size // 2)
    v_tail += head * (value_size // 2)
    most = tl.full([BLOCK_R], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)
    # What all channels of the result have in common, where each token of values has one middle.
    offset = tl.zeros([BLOCK_R], tl.float32)
    result = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for start in range(low, high, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        ok = t < high
        if KEY_FORM == 0:
            k, step, middle = _centered(k_codes, k_steps, t, ok, q.dtype, DIM, KEY_BITS, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * step[None, :] + q_sum[:, None] * middle[None, :]
        else:
            k = _tokens(k_codes, k_steps, k_tail, t, ok, cut, DIM, KEY_BITS, KEY_FORM, BLOCK_D).to(q.dtype)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s *= scale
        seen = ok[None, :] & (t[None, :] <= at[:, None])
        if window > 0:
            seen = seen & (t[None, :] > at[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        p, shrink, most = softmax_step(s, most)
        weight = weight * shrink + tl.sum(p, 1)
        result *= shrink[:, None]
        if VALUE_FORM == 0:
            v, step, middle = _centered(v_codes, v_steps, t, ok, q.dtype, WIDTH, VALUE_BITS, BLOCK_E)
            result += tl.dot((p * step[None, :]).to(q.dtype), v, input_precision="ieee")
            offset = offset * shrink + tl.sum(p * middle[None, :], 1)
        else:
            v = _tokens(v_codes, v_steps, v_tail, t, ok, cut, WIDTH, VALUE_BITS, VALUE_FORM, BLOCK_E).to(q.dtype)
            result += tl.dot(p.to(q.dtype), v, input_precision="ieee")
    place = (head * splits + split) * rows + row
    tl.store(peak + place, most, mask=row < rows)
    tl.store(total + place, weight, mask=row < rows)
    out = part + place[:, None] * WIDTH + e[None, :]
    if VALUE_FORM == 0:
        result += offset[:, None]
    tl.store(out, result, mask=(row < rows)[:, None] & (e < WIDTH)[None, :])
