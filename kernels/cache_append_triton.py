"""The Triton kernels of `cache_append`: one program quantizes a block of 32 tokens of one head, another keeps the tail.

Both find out on the device where the new tokens belong: nothing waits for the host, so a decode step stays one static
graph. Every code is the CPU's: one difference, one quotient, each rounded correctly.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .packed_cache import GROUP, Form, Packing

_jit: Callable[..., Any] = triton.jit
FORM_NUMBERS = {"per_token": 0, "per_channel": 1, "per_group": 2}


def launch(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: Form) -> Tensor:
    """Append in place, arguments unchecked, on the store's device (the CPU under TRITON_INTERPRET=1)."""
    batch, heads, count, dim = new.shape
    if batch * heads * count == 0:
        return store
    packing, size = Packing(bits, form, dim), store.shape[-1]
    codes, steps, tail = packing.planes(store)
    new = new.contiguous()
    channels, groups = triton.next_power_of_2(dim), triton.next_power_of_2(max(dim // GROUP, 1))
    # Whatever the first position, so many blocks hold the new tokens.
    blocks = triton.cdiv(count + GROUP - 1, GROUP)
    _quantize_kernel[(batch * heads, blocks)](
        codes, steps, codes if tail is None else tail, new, positions, count, size,
        DIM=dim, BITS=bits, FORM=FORM_NUMBERS[form], BLOCK_D=channels, GROUPS=groups, PARTS=8 // bits,
        BLOCK_W=triton.next_power_of_2(packing.row), num_warps=4,
    )  # fmt: skip
    if tail is not None:
        _tail_kernel[(batch * heads,)](tail, new, positions, count, size, DIM=dim, BLOCK_D=channels, num_warps=4)
    return store


@_jit
def _value(new, tail, head, t, channel, first, base, count, size, DIM: tl.constexpr, FORM: tl.constexpr):
    """Tokens `t` of the block at `base`: new ones, or what the tail holds from before; zero where there are none."""
    inside = channel < DIM
    fresh = inside & (t >= first) & (t < first + count)
    x = tl.load(new + (head * count + t - first) * DIM + channel, mask=fresh, other=0.0).to(tl.float32)
    if FORM != 0:
        kept = tl.load(tail + head * (size // 2) + (t - base) * DIM + channel, mask=inside & (t < first), other=0.0)
        x = tl.where(t < first, kept.to(tl.float32), x.to(tl.float16).to(tl.float32))
    return x


@_jit
def _scale(low, high, poison, BITS: tl.constexpr):
    """The step of a group in float16; NaN where `poison` says that a value is NaN or infinite."""
    span = tl.maximum(high - low, 1e-5)
    return (tl.div_rn(span, tl.full(span.shape, 2**BITS - 1, tl.float32)) + poison).to(tl.float16)


@_jit
def _quantize_kernel(
    codes, steps, tail, new, positions, count, size,
    DIM: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One block of 32 tokens: the steps of its groups are stored first, then read by each channel's place in a byte."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.load(positions).to(tl.int32)
    base = (first // 32 + tl.program_id(1)) * 32
    stop = first + count
    tokens = base + tl.arange(0, 32)
    # With a tail only whole blocks are packed, all of their tokens at once.
    written = (tokens >= first) & (tokens < stop) if FORM == 0 else (tokens >= 0) & (base + 32 <= stop)
    steps += head * (size // 2)
    codes += head * size
    if FORM == 2:
        t, group = tokens[:, None, None], tl.arange(0, GROUPS)[None, :, None]
        channel = group * 32 + tl.arange(0, 32)[None, None, :]
        x = _value(new, tail, head, t, channel, first, base, count, size, DIM, FORM)
        low = tl.min(x, 2)
        scale = _scale(low, tl.max(x, 2), tl.sum(x - x, 2), BITS)
        place = tokens[:, None] * (DIM // 32) + tl.arange(0, GROUPS)[None, :]
        kept = written[:, None] & (tl.arange(0, GROUPS) < DIM // 32)[None, :]
    else:
        channel = tl.arange(0, BLOCK_D)[None, :]
        x = _value(new, tail, head, tokens[:, None], channel, first, base, count, size, DIM, FORM)
        if FORM == 0:
            inside = channel < DIM
            low = tl.min(tl.where(inside, x, float("inf")), 1)
            scale = _scale(low, tl.max(tl.where(inside, x, float("-inf")), 1), tl.sum(x - x, 1), BITS)
            place, kept = tokens, written
        else:
            low = tl.min(x, 0)
            scale = _scale(low, tl.max(x, 0), tl.sum(x - x, 0), BITS)
            place = base // 32 * DIM + tl.arange(0, BLOCK_D)
            kept = (tl.arange(0, BLOCK_D) < DIM) & (base + 32 <= stop)
    tl.store(steps + 2 * place, scale, mask=kept)
    tl.store(steps + 2 * place + 1, low.to(tl.float16), mask=kept)
    tl.debug_barrier()
    WIDTH: tl.constexpr = DIM * BITS // 8
    t, part, byte = tokens[:, None, None], tl.arange(0, PARTS)[None, :, None], tl.arange(0, BLOCK_W)[None, None, :]
    channel = part * WIDTH + byte
    ok = written[:, None, None] & (byte < WIDTH)
    if FORM == 0:
        place = t + channel * 0
    elif FORM == 1:
        place = t // 32 * DIM + channel
    else:
        place = t * (DIM // 32) + channel // 32
    scale = tl.load(steps + 2 * place, mask=ok, other=1.0).to(tl.float32)
    low = tl.load(steps + 2 * place + 1, mask=ok, other=0.0).to(tl.float32)
    x = _value(new, tail, head, t, channel, first, base, count, size, DIM, FORM)
    # Adding and subtracting 1.5 * 2^23 rounds half to even, like torch.round, also in the interpreter (no libdevice).
    code = (tl.div_rn(x - low, scale) + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, 0.0), 2**BITS - 1).to(tl.int32)
    packed = tl.sum(code << (part * BITS), 1)
    place = tokens[:, None] * WIDTH + tl.arange(0, BLOCK_W)[None, :]
    tl.store(codes + place, packed.to(tl.uint8), mask=written[:, None] & (tl.arange(0, BLOCK_W) < WIDTH)[None, :])


@_jit
def _tail_kernel(tail, new, positions, count, size, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The new tokens of the last block, in float16; after the blocks, since they read what the tail held."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.load(positions).to(tl.int32)
    base = (first + count - 1) // 32 * 32
    t, channel = (base + tl.arange(0, 32))[:, None], tl.arange(0, BLOCK_D)[None, :]
    ok = (t >= first) & (t < first + count) & (channel < DIM)
    x = tl.load(new + (head * count + t - first) * DIM + channel, mask=ok, other=0.0)
    tl.store(tail + head * (size // 2) + (t - base) * DIM + channel, x.to(tl.float16), mask=ok)
