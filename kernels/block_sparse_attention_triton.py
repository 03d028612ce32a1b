"""`block_sparse_attention` on CUDA: the loop of FlashAttention-2 over the listed key blocks, then over the dense tail.

One program takes a tile of queries of one head. With a token order it loads rows of queries, keys and values by token
and stores results to the token's row, so nothing is permuted in memory. Softmax is computed to the base 2.
"""

# ruff: noqa: ANN001, ANN201, ANN202, SIM108 (the arguments of Triton kernels are typed by Triton itself)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

_jit: Callable[..., Any] = triton.jit


@_jit
def _load(at, row_stride, rows, holds, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Some rows ``[BLOCK, BLOCK_D]``, zeros where there is none."""
    ds = tl.arange(0, BLOCK_D)
    pointers = at + rows[:, None] * row_stride + ds[None, :]
    if MASKED:
        return tl.load(pointers, mask=holds[:, None] & (ds < D)[None, :], other=0.0)
    if BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(ds < D)[None, :], other=0.0)


@_jit
def _attend(
    q, acc, total, peak, position, key, value, order, key_bias, key_n, value_n, places, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys at `BLOCK_N` positions to the running sums; ``MASKED`` if one of the positions can be empty."""
    ns = tl.arange(0, BLOCK_N)
    if HAS_ORDER:
        tokens = tl.load(order + position + ns, mask=ns < places - position, other=-1)
        holds = tokens >= 0
        rows = tokens.to(tl.int64)
    else:
        holds = ns < places - position
        rows = ns
        first = tl.cast(position, tl.int64)
        key += first * key_n
        value += first * value_n
        key_bias += position
    k = _load(key, key_n, rows, holds, D, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if MASKED or HAS_BIAS:
        scores *= scale
        if HAS_BIAS:
            bias = tl.load(key_bias + rows, mask=holds, other=float("-inf"))
            scores += bias[None, :] * 1.4426950408889634
        else:
            scores = tl.where(holds[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # No key so far: the differences below would be of infinities.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(peak - level)
    else:
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        shares = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(shares, 1)
    acc = acc * shrink[:, None]
    v = _load(value, value_n, rows, holds, D, BLOCK_D, MASKED)
    acc = tl.dot(shares.to(v.dtype), v, acc, input_precision="tf32x3")
    return acc, total, higher


@_jit
def attend_kernel(
    query, key, value, counts, blocks, pattern, order, key_bias, head_order, output, lse, scale,
    H, GROUP, R, Q, KEY_PLACES, Q_PLACES, K_PLACES,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, output_b, output_h, output_n,
    lse_bh, counts_r, blocks_r, blocks_q, pattern_b, order_r, bias_b, bias_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_PATTERN: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr,
    HAS_HEAD_ORDER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head a program: dense rows of all heads first, then the listed rows, head by head.

    The grid is ``B * H * ceil(Q_PLACES / BLOCK_M)``; ``WHOLE`` says that listed blocks have no empty position.
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
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    if HAS_PATTERN:
        row = tl.load(pattern + b * pattern_b + h).to(tl.int64)
    else:
        row = (head % R).to(tl.int64)
    order += row * order_r
    key_bias += b * bias_b + h * bias_h
    key += b * key_b + h // GROUP * key_h
    value += b * value_b + h // GROUP * value_h

    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if HAS_ORDER:
        asking = tl.load(order + places, mask=places < Q_PLACES, other=-1)
        held = asking >= 0
    else:
        asking = places
        held = places < Q_PLACES
    q = _load(query + b * query_b + h * query_h, query_n, asking.to(tl.int64), held, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    tail = 0
    if tile < listed_tiles:
        block = tile // (BLOCK_SIZE // BLOCK_M)
        listed = blocks + row * blocks_r + block * blocks_q
        parts: tl.constexpr = BLOCK_SIZE // BLOCK_N
        for part in range(tl.load(counts + row * counts_r + block) * parts):
            position = tl.load(listed + part // parts) * BLOCK_SIZE + part % parts * BLOCK_N
            acc, total, peak = _attend(
                q, acc, total, peak, position, key, value, order, key_bias, key_n, value_n, K_PLACES, scale,
                D, BLOCK_D, BLOCK_N, HAS_ORDER, HAS_BIAS, HAS_ORDER or not WHOLE,
            )  # fmt: skip
        tail = KEY_PLACES
    for position in range(tail, K_PLACES, BLOCK_N):
        acc, total, peak = _attend(
            q, acc, total, peak, position, key, value, order, key_bias, key_n, value_n, K_PLACES, scale,
            D, BLOCK_D, BLOCK_N, HAS_ORDER, HAS_BIAS, True,
        )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)
    acc = acc / divisor[:, None]
    ds = tl.arange(0, BLOCK_D)
    pointers = output + b * output_b + h * output_h + asking.to(tl.int64)[:, None] * output_n + ds[None, :]
    tl.store(pointers, acc.to(output.dtype.element_ty), mask=held[:, None] & (ds < D)[None, :])
    if HAS_LSE:
        logarithm = (peak + tl.log2(divisor)) * 0.6931471805599453  # no key: peak is -inf
        tl.store(lse + head.to(tl.int64) * lse_bh + asking, logarithm, mask=held)
