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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed_cache import Packing, packings
from .split_softmax_triton import launch_join, parts_for, softmax_step

_jit: Callable[..., Any] = triton.jit


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
    block_r = max(8, min(32, 1 << (rows - 1).bit_length()))
    blocks = -(-rows // block_r)
    sides = forms("KEY", keys_as, query.dtype) | forms("VALUE", values_as, query.dtype)
    block_t, warps = block_for(block_r, sides["KEY_WORDS"] and sides["VALUE_WORDS"])
    splits = choose_splits(batch * heads * blocks, keys_as.capacity(key.shape[-1]), block_t)
    part, peak, total = parts_for(batch * heads, splits, rows, width, query.device)
    (k_codes, k_steps, k_tail), (v_codes, v_steps, v_tail) = _pointers(key, keys_as), _pointers(value, values_as)
    sizes = {
        "DIM": dim, "WIDTH": width, "KEY_BITS": keys_as.bits, "VALUE_BITS": values_as.bits,
        "COMPILED": query.is_cuda, "KIVI": keys_as.has_tail, **sides,
        "BLOCK_R": block_r, "BLOCK_T": block_t, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_E": max(16, triton.next_power_of_2(width)), "PADDED": starts is not None,
    }  # fmt: skip
    _part_kernel[(batch * heads, blocks, splits)](
        query.contiguous(), k_codes, k_steps, k_tail, v_codes, v_steps, v_tail, positions,
        positions if starts is None else starts, part, peak, total,
        scale, count, window, query_heads // heads, heads, key.shape[-1], value.shape[-1], splits, **sizes,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    launch_join(part, peak, total, y)
    return y


def forms(side: str, packing: Packing, dtype: torch.dtype) -> dict[str, Any]:
    """Whether codes become 16-bit floats two at a time, and what is added to them.

    That is what puts them around zero: sums of values over many tokens must be no larger than what they are to be.
    Keys, whose sums are those of one head's channels, are spared the subtraction. bfloat16 has room for 4 bits only,
    float32 has no pairs, and KIVI's steps need float32.
    """
    most = {torch.float16: 8, torch.bfloat16: 4}.get(dtype, 0)
    words = not packing.has_tail and packing.bits <= most and packing.row % 2 == 0
    base = -(2 ** (packing.bits - 1))
    if words and side == "KEY":
        base = 1024 if dtype == torch.float16 else 128
    return {f"{side}_WORDS": words, f"{side}_BASE": base}


def block_for(block_r: int, words: bool) -> tuple[int, int]:
    """Tokens that a program unpacks at a time, and its warps: the best of twelve on an H100 that spill no registers.

    32768 tokens, 8 heads of 128 channels, one sequence, microseconds (bfloat16 53): 4 bits 35, with 64 tokens 36 to 39;
    8 bits 46, with 8 warps 65; KIVI's 4 bits 58, with 128 tokens 68.
    """
    if block_r > 16:
        return 32, 8
    return (128, 4) if words else (64, 4 if block_r <= 8 else 8)


def choose_splits(programs: int, tokens: int, block_t: int) -> int:
    """Parts of the tokens: enough programs for three a multiprocessor of a large GPU (132), of two blocks each."""
    return max(1, min(-(-396 // programs), -(-tokens // (2 * block_t)), 128))


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
def _channels(WORDS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The channel of each column of `_numbers`, DIM or more where a column holds none."""
    n = tl.arange(0, BLOCK)
    if not WORDS:
        return n
    ROW: tl.constexpr = DIM * BITS // 8
    LANES: tl.constexpr = BLOCK * BITS // 16
    part, word = n // LANES, n % LANES
    channel = part % (8 // BITS) * ROW + 2 * word + part // (8 // BITS)
    return tl.where(word < ROW // 2, channel, BLOCK)


@triton.constexpr_function
def _two_floats(kind, shift, bits, base, high):
    """PTX that makes two 16-bit floats of two words in a register: (word >> shift) & mask, with the bits of a power of
    two before them, and less that where the numbers shall lie around zero.
    """
    mask, one = (2**bits - 1) * 0x10001, {"bf16": 0x3F803F80, "f16": 0x3C003C00}[kind]
    made = f"shr.b32 bits, $1, {shift}; lop3.b32 bits, bits, {mask:#x}, {high * 0x10001:#x}, 0xea;"
    if base > 0:
        return f"{{ .reg .b32 bits; {made} mov.b32 $0, bits; }}"
    # 128 + half is 0x43 in its high byte and half in its low one, 1024 + half likewise with 0x64.
    offset = (0x8000 | high | -base) * 0x10001
    constants = f"mov.b32 one, {one:#x}; mov.b32 offset, {offset:#x};"
    return f"{{ .reg .b32 bits, one, offset; {constants} {made} fma.rn.{kind}x2 $0, bits, one, offset; }}"


@_jit
def _part(x, dtype: tl.constexpr, BASE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, COMPILED: tl.constexpr):
    """Codes in 16-bit words as floats: they are the last bits of one whose other bits are those of 128 or of 1024."""
    HIGH: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
    if COMPILED:
        # The compiler would take the words one by one.
        KIND: tl.constexpr = "bf16" if dtype == tl.bfloat16 else "f16"
        asm: tl.constexpr = _two_floats(KIND, SHIFT, BITS, BASE, HIGH)
        y = tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.int16, is_pure=True, pack=2)
        y = y.to(dtype, bitcast=True)
    else:
        y = (((x >> SHIFT) & (2**BITS - 1)) | HIGH).to(tl.int16).to(dtype, bitcast=True)
        if BASE < 0:
            y = (y - ((128 if dtype == tl.bfloat16 else 1024) - BASE)).to(dtype)
    return y


@_jit
def _pair(x, dtype: tl.constexpr, BASE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, COMPILED: tl.constexpr):
    first = _part(x, dtype, BASE, SHIFT, BITS, COMPILED)
    return tl.join(first, _part(x, dtype, BASE, SHIFT + 8, BITS, COMPILED))


@_jit
def _numbers(
    codes, t, ok, dtype: tl.constexpr, BASE: tl.constexpr,
    WORDS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Codes as whole numbers code + BASE in `dtype`, exact, [BLOCK_T, BLOCK]: columns in the order of `_channels`."""
    if WORDS:
        ROW: tl.constexpr = DIM * BITS // 8
        LANES: tl.constexpr = BLOCK * BITS // 16
        word = tl.arange(0, LANES)
        holds = ok[:, None] & (word < ROW // 2)[None, :]
        x = tl.load(codes.to(tl.pointer_type(tl.int16)) + t[:, None] * (ROW // 2) + word[None, :], mask=holds, other=0)
        if BITS == 8:
            parts = _pair(x, dtype, BASE, 0, BITS, COMPILED).permute(0, 2, 1)
        elif BITS == 4:
            parts = tl.join(_pair(x, dtype, BASE, 0, BITS, COMPILED), _pair(x, dtype, BASE, 4, BITS, COMPILED)).permute(
                0, 2, 3, 1
            )
        else:
            even = tl.join(_pair(x, dtype, BASE, 0, BITS, COMPILED), _pair(x, dtype, BASE, 4, BITS, COMPILED))
            odd = tl.join(_pair(x, dtype, BASE, 2, BITS, COMPILED), _pair(x, dtype, BASE, 6, BITS, COMPILED))
            parts = tl.join(even, odd).permute(0, 2, 3, 4, 1)
        return parts.reshape(BLOCK_T, BLOCK)
    # The bits of 2^23 + code.
    high = (_codes(codes, t, ok, DIM, BITS, BLOCK) | 0x4B000000).to(tl.float32, bitcast=True)
    return (high - (8388608.0 - BASE)).to(dtype)


@_jit
def _by_channel(
    codes, steps, t, start, ok, dtype: tl.constexpr,
    DIM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Tokens of blocks of 32 that share the steps of a channel, [BLOCK_T, BLOCK]; `start` is where a block begins."""
    code = _codes(codes, t, ok, DIM, BITS, BLOCK).to(tl.float32)
    channel = tl.arange(0, BLOCK)
    place = (start // 32 + tl.arange(0, BLOCK_T // 32))[:, None] * DIM + channel[None, :]
    mask = (start + 32 * tl.arange(0, BLOCK_T // 32) <= tl.max(tl.where(ok, t, -1), 0))[:, None] & (channel < DIM)[
        None, :
    ]
    scale = tl.load(steps + 2 * place, mask=mask, other=0.0).to(tl.float32)
    low = tl.load(steps + 2 * place + 1, mask=mask, other=0.0).to(tl.float32)
    x = code.reshape(BLOCK_T // 32, 32, BLOCK) * scale[:, None, :] + low[:, None, :]
    return x.reshape(BLOCK_T, BLOCK).to(dtype)


@_jit
def _by_group(
    codes, steps, t, ok, dtype: tl.constexpr,
    DIM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Tokens whose channels have steps by groups of 32, [BLOCK_T, BLOCK]."""
    code = _codes(codes, t, ok, DIM, BITS, BLOCK).to(tl.float32)
    group = tl.arange(0, BLOCK // 32)
    place = (t * (DIM // 32))[:, None] + group[None, :]
    mask = ok[:, None] & (group < DIM // 32)[None, :]
    scale = tl.load(steps + 2 * place, mask=mask, other=0.0).to(tl.float32)
    low = tl.load(steps + 2 * place + 1, mask=mask, other=0.0).to(tl.float32)
    x = code.reshape(BLOCK_T, BLOCK // 32, 32) * scale[:, :, None] + low[:, :, None]
    return x.reshape(BLOCK_T, BLOCK).to(dtype)


@_jit
def _seen_scores(s, t, at, ok, window):
    """Scores [tokens, rows] of queries at `at`, -inf where a query does not see a token."""
    seen = ok[:, None] & (t[:, None] <= at[None, :])
    if window > 0:
        seen = seen & (t[:, None] > at[None, :] - window)
    return tl.where(seen, s, float("-inf"))


@_jit
def _part_kernel(
    query, k_codes, k_steps, k_tail, v_codes, v_steps, v_tail, positions, starts, part, peak, total,
    scale, count, window, group, heads, key_size, value_size, splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KIVI: tl.constexpr,
    KEY_WORDS: tl.constexpr, VALUE_WORDS: tl.constexpr, KEY_BASE: tl.constexpr, VALUE_BASE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PADDED: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Row r of a head is query r // group of its query head r % group: a program's queries are neighbours."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = count * group
    # Offsets in a head fit 32 bits; as 64 they would fill the registers.
    first = tl.load(positions).to(tl.int32)
    at = first + row // group
    d = _channels(KEY_WORDS, DIM, KEY_BITS, BLOCK_D)
    e = _channels(VALUE_WORDS, WIDTH, VALUE_BITS, BLOCK_E)
    place = (head * group + row % group) * count + row // group
    q_mask = (row < rows)[None, :] & (d < DIM)[:, None]
    q = tl.load(query + place[None, :] * DIM + d[:, None], mask=q_mask, other=0.0)
    q_sum = tl.sum(q.to(tl.float32), 0)
    begin = 0
    if window > 0:
        begin = tl.maximum(first + tl.program_id(1) * BLOCK_R // group - window + 1, begin)
    if PADDED:
        begin = tl.maximum(tl.load(starts + head // heads).to(tl.int32), begin)
    end = first + tl.minimum((tl.program_id(1) * BLOCK_R + BLOCK_R - 1) // group, count - 1) + 1
    share = tl.cdiv(tl.cdiv(end - begin // 32 * 32, splits), BLOCK_T) * BLOCK_T
    low = begin // 32 * 32 + split * share
    high = tl.minimum(low + share, end)
    # What KIVI keeps in 16 bits: the tokens of the last block of 32.
    packed = high
    if KIVI:
        packed = tl.minimum(high, (first + count - 1) // 32 * 32)
    k_codes += head * key_size
    k_steps += head * (key_size // 2)
    v_codes += head * value_size
    v_steps += head * (value_size // 2)
    most = tl.full([BLOCK_R], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)
    # What all channels of the result have in common, where a token of values has one middle.
    common = tl.zeros([BLOCK_R], tl.float32)
    result = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    for start in range(low, packed, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        ok = (t < packed) & (t >= begin)
        if KIVI:
            k = _by_channel(k_codes, k_steps, t, start, ok, q.dtype, DIM, KEY_BITS, BLOCK_D, BLOCK_T)
            s = tl.dot(k, q, input_precision="ieee")
        else:
            # A token is (number - base) step + low: products are made of the numbers alone.
            k = _numbers(k_codes, t, ok, q.dtype, KEY_BASE, KEY_WORDS, DIM, KEY_BITS, BLOCK_D, BLOCK_T, COMPILED)
            step = tl.load(k_steps + 2 * t, mask=ok, other=0.0).to(tl.float32)
            middle = tl.load(k_steps + 2 * t + 1, mask=ok, other=0.0).to(tl.float32) - KEY_BASE * step
            s = tl.dot(k, q, input_precision="ieee") * step[:, None] + q_sum[None, :] * middle[:, None]
        p, shrink, most = softmax_step(_seen_scores(s * scale, t, at, ok, window), most, 0)
        weight = weight * shrink + tl.sum(p, 0)
        result *= shrink[None, :]
        if KIVI:
            v = _by_group(v_codes, v_steps, t, ok, q.dtype, WIDTH, VALUE_BITS, BLOCK_E, BLOCK_T)
            result = tl.dot(tl.trans(v), p.to(q.dtype), result, input_precision="ieee")
        else:
            v = _numbers(
                v_codes, t, ok, q.dtype, VALUE_BASE, VALUE_WORDS, WIDTH, VALUE_BITS, BLOCK_E, BLOCK_T, COMPILED
            )
            step = tl.load(v_steps + 2 * t, mask=ok, other=0.0).to(tl.float32)
            middle = tl.load(v_steps + 2 * t + 1, mask=ok, other=0.0).to(tl.float32) - VALUE_BASE * step
            common = common * shrink + tl.sum(p * middle[:, None], 0)
            p *= step[:, None]
            result = tl.dot(tl.trans(v), p.to(q.dtype), result, input_precision="ieee")
    if KIVI:
        k_tail += head * (key_size // 2)
        v_tail += head * (value_size // 2)
        for start in range(tl.maximum(low, packed), high, 32):
            slot = tl.arange(0, 32)
            t = start + slot
            ok = (t < high) & (t >= begin)
            k = tl.load(k_tail + slot[:, None] * DIM + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
            s = tl.dot(k.to(q.dtype), q, input_precision="ieee") * scale
            p, shrink, most = softmax_step(_seen_scores(s, t, at, ok, window), most, 0)
            weight = weight * shrink + tl.sum(p, 0)
            v = tl.load(v_tail + slot[None, :] * WIDTH + e[:, None], mask=ok[None, :] & (e < WIDTH)[:, None], other=0.0)
            result = tl.dot(v.to(q.dtype), p.to(q.dtype), result * shrink[None, :], input_precision="ieee")
    else:
        result += common[None, :]
    place = (head * splits + split) * rows + row
    tl.store(peak + place, most, mask=row < rows)
    tl.store(total + place, weight, mask=row < rows)
    out = part + place[None, :] * WIDTH + e[:, None]
    tl.store(out, result, mask=(row < rows)[None, :] & (e < WIDTH)[:, None])
