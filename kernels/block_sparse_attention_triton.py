"""The Triton kernels of `block_sparse_attention`: FlashAttention-2's loop over listed key blocks, and what orders keys.

Queries, keys and values are read in the order of positions, by tensor descriptors (the copy engine of sm_90) or by
pointers; with a token order, `order_kernel` puts them there first. Results are stored by token.

In the loop a thread has no register to spare: of the 128 that let two programs of 8 warps share a multiprocessor, 112
are accumulators. So a bias is what the sum of products starts from, empty positions stand behind the others in their
block where one number tells them apart, and rows are not gathered while they are loaded.
"""

# ruff: noqa: ANN001, ANN201, ANN202, SIM108 (the arguments of Triton kernels are typed by Triton itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

_jit: Callable[..., Any] = triton.jit


@_jit
def _tile(
    source, b, g, position, batch_stride, head_stride, row_stride, places,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Keys or values at ``BLOCK_N`` positions ``[BLOCK_N, BLOCK_D]``; ``CUT`` if there can be less."""
    if DESCRIPTORS:
        tile = source.load([b, g, tl.cast(position, tl.int32), 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        ns = tl.arange(0, BLOCK_N)
        ds = tl.arange(0, BLOCK_D)
        first = tl.cast(b, tl.int64) * batch_stride + tl.cast(g, tl.int64) * head_stride
        first += tl.cast(position, tl.int64) * row_stride
        pointers = source + first + ns[:, None] * row_stride + ds[None, :]
        if CUT:
            tile = tl.load(pointers, mask=(ns < places - position)[:, None] & (ds < D)[None, :], other=0.0)
        elif BLOCK_D == D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(ds < D)[None, :], other=0.0)
    return tile


@_jit
def _attend(
    q, acc, total, peak, b, g, position, key, value, held, key_bias, places, scale,
    key_b, key_h, key_n: tl.constexpr, value_b, value_h, value_n: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Add the keys at `BLOCK_N` positions to the running sums; ``CUT`` if positions can lie behind the end."""
    k = _tile(key, b, g, position, key_b, key_h, key_n, places, D, BLOCK_N, BLOCK_D, DESCRIPTORS, CUT)
    ns = tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        # The sum starts from the bias, which so takes no registers of its own.
        bias = tl.load(key_bias + position + ns, mask=ns < places - position, other=float("-inf"))
        scores = tl.zeros([q.shape[0], BLOCK_N], tl.float32) + (bias * (1.4426950408889634 / scale))[None, :]
        scores = tl.dot(q, tl.trans(k), scores, input_precision="tf32x3")
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        if HAS_ORDER:
            limit = tl.load(held + position // BLOCK_SIZE) - position % BLOCK_SIZE
            scores = tl.where((ns < limit)[None, :], scores, float("-inf"))
        elif CUT:
            scores = tl.where((ns < places - position)[None, :], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    level = higher
    if HAS_ORDER or HAS_BIAS:  # no key so far: the differences below would be of infinities
        level = tl.where(higher == float("-inf"), 0.0, higher)
    shares = tl.exp2(scores * scale - level[:, None])
    shrink = tl.exp2(peak - level)
    total = total * shrink + tl.sum(shares, 1)
    acc = acc * shrink[:, None]
    v = _tile(value, b, g, position, value_b, value_h, value_n, places, D, BLOCK_N, BLOCK_D, DESCRIPTORS, CUT)
    acc = tl.dot(shares.to(v.dtype), v, acc, input_precision="tf32x3")
    return acc, total, higher


@_jit
def attend_kernel(
    query, key, value, counts, blocks, pattern, order, held, key_bias, head_order, output, lse, scale,
    H, GROUP, R, Q, KEY_PLACES, Q_PLACES, K_PLACES,
    query_b, query_h, query_n, key_b, key_h, value_b, value_h, output_b, output_h, output_n,
    lse_bh, counts_r, blocks_r, blocks_q, pattern_b, order_r, held_r, bias_b, bias_h,
    key_n: tl.constexpr, value_n: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HAS_PATTERN: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_HEAD_ORDER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head a program: dense rows of all heads first, then the listed rows, head by head.

    The grid is ``B * H * ceil(Q_PLACES / BLOCK_M)``. Queries, keys, values and ``key_bias`` are by position, output and
    ``lse`` by token. ``held`` is the number of keys in each block, which are its first. ``WHOLE`` says that listed
    blocks have no position behind the end.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(Q_PLACES, BLOCK_M)
    heads = tl.num_programs(0) // tiles
    listed_tiles = tl.minimum(Q * (BLOCK_SIZE // BLOCK_M), tiles)
    dense_tiles = tiles - listed_tiles
    if program < heads * dense_tiles:
        head = program // dense_tiles
        tile = listed_tiles + program % dense_tiles
    else:
        program -= heads * dense_tiles
        head = program // listed_tiles
        tile = program % listed_tiles
        if HAS_HEAD_ORDER:
            head = tl.load(head_order + head).to(tl.int32)
    b = head // H
    h = head % H
    g = h // GROUP
    if HAS_PATTERN:
        row = tl.load(pattern + b * pattern_b + h).to(tl.int32)
    else:
        row = head % R
    if HAS_BIAS:
        key_bias += b.to(tl.int64) * bias_b + h * bias_h

    q = _tile(query, b, h, tile * BLOCK_M, query_b, query_h, query_n, Q_PLACES, D, BLOCK_M, BLOCK_D, DESCRIPTORS, True)
    if HAS_ORDER:
        held += row * held_r
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    tail = 0
    if tile < listed_tiles:
        block = tile // (BLOCK_SIZE // BLOCK_M)
        listed = blocks + row.to(tl.int64) * blocks_r + block.to(tl.int64) * blocks_q
        parts: tl.constexpr = BLOCK_SIZE // BLOCK_N
        for part in range(tl.load(counts + row * counts_r + block) * parts):
            position = tl.load(listed + part // parts) * BLOCK_SIZE + part % parts * BLOCK_N
            acc, total, peak = _attend(
                q, acc, total, peak, b, g, position, key, value, held, key_bias, K_PLACES, scale,
                key_b, key_h, key_n, value_b, value_h, value_n, D, BLOCK_D, BLOCK_N, BLOCK_SIZE,
                DESCRIPTORS, HAS_ORDER, HAS_BIAS, not WHOLE,
            )  # fmt: skip
        tail = KEY_PLACES
    for position in range(tail, K_PLACES, BLOCK_N):
        acc, total, peak = _attend(
            q, acc, total, peak, b, g, position, key, value, held, key_bias, K_PLACES, scale,
            key_b, key_h, key_n, value_b, value_h, value_n, D, BLOCK_D, BLOCK_N, BLOCK_SIZE,
            DESCRIPTORS, HAS_ORDER, HAS_BIAS, True,
        )  # fmt: skip

    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if HAS_ORDER:
        asking = tl.load(order + row.to(tl.int64) * order_r + places, mask=places < Q_PLACES, other=-1)
    else:
        asking = tl.where(places < Q_PLACES, places, -1)
    divisor = tl.where(total == 0.0, 1.0, total)
    acc = acc / divisor[:, None]
    ds = tl.arange(0, BLOCK_D)
    output += b.to(tl.int64) * output_b + h.to(tl.int64) * output_h
    pointers = output + asking.to(tl.int64)[:, None] * output_n + ds[None, :]
    tl.store(pointers, acc.to(output.dtype.element_ty), mask=(asking >= 0)[:, None] & (ds < D)[None, :])
    if HAS_LSE:
        logarithm = (peak + tl.log2(divisor)) * 0.6931471805599453  # no key: peak is -inf
        tl.store(lse + head.to(tl.int64) * lse_bh + asking, logarithm, mask=asking >= 0)


@_jit
def front_kernel(order, front, held, PLACES, BLOCK_SIZE: tl.constexpr):
    """Put the tokens of a block of positions before its empty positions, and count them; the grid is (blocks, rows)."""
    block = tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * PLACES
    places = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tokens = tl.load(order + first + places, mask=places < PLACES, other=-1)
    holds = (tokens >= 0).to(tl.int32)
    number = tl.sum(holds, 0)
    rank = tl.where(tokens >= 0, tl.cumsum(holds, 0), number + tl.cumsum(1 - holds, 0)) - 1
    target = block * BLOCK_SIZE + rank
    tl.store(front + first + target, tokens, mask=target < PLACES)
    tl.store(held + tl.program_id(1) * tl.num_programs(0) + block, number)


@_jit
def order_kernel(
    source, order, pattern, target, H, GROUP, SHARE, R, PLACES, source_b, source_h, source_n, target_h, target_n,
    pattern_b, order_r, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_PATTERN: tl.constexpr,
):  # fmt: skip
    """Put the rows of one head at 64 positions, zeros where no token stands.

    The grid is ``(ceil(PLACES / 64), B * H / SHARE)``: target heads are for ``SHARE`` query heads each, source heads
    for ``GROUP``.
    """
    head = tl.program_id(1)
    b = head // (H // SHARE)
    h = head % (H // SHARE) * SHARE
    if HAS_PATTERN:
        row = tl.load(pattern + b * pattern_b + h).to(tl.int64)
    else:
        row = ((b * H + h) % R).to(tl.int64)
    places = tl.program_id(0) * 64 + tl.arange(0, 64)
    tokens = tl.load(order + row * order_r + places, mask=places < PLACES, other=-1)
    ds = tl.arange(0, BLOCK_D)
    source += b.to(tl.int64) * source_b + (h // GROUP).to(tl.int64) * source_h
    pointers = source + tokens.to(tl.int64)[:, None] * source_n + ds[None, :]
    tile = tl.load(pointers, mask=(tokens >= 0)[:, None] & (ds < D)[None, :], other=0.0)
    pointers = target + head.to(tl.int64) * target_h + places.to(tl.int64)[:, None] * target_n + ds[None, :]
    tl.store(pointers, tile, mask=(places < PLACES)[:, None] & (ds < D)[None, :])
