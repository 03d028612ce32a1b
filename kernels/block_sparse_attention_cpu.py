"""`block_sparse_attention` on the CPU: the key blocks that query blocks keep are gathered, then attended to densely.

Query blocks of a head that keep about as many key blocks are taken together, some for each thread. Dense rows are given
to aten's own attention as they are. For the others there are two ways; `cpu_path` says which is taken, and why:

    products   two batched matrix products for some keys at a time, with the softmax between them in the memory of the
               scores, which stays in the second-level cache
    fused      aten's own attention over the gathered keys: for bfloat16 where the processor multiplies it

Loops of each kind at [1, 4, 8192, 64] and density 0.25, random lists in blocks of 128, one core of a Sapphire Rapids:
times faster than scaled_dot_product_attention over everything. Where no score can be large, products take no maximum
off.

                                             products, no maximum    products    fused
    float32                                          3.1                2.8       2.9
    float16 (the processor multiplies float32)       3.3                3.1       2.8
    bfloat16 on AMX                                  1.1                1.1       2.6
    bfloat16 where only float32 is multiplied        3.5                3.2       2.8

The operator itself in float32, while others used the machine, on one core and on two: random lists 3.0 and 2.9, bands
3.0 and 2.7, tiles 2.9 and 2.8; in blocks of 64 2.5 and 2.4 for all. FlexAttention, compiled by torch.compile in 3 to
37 s, reached 1.3 and 1.4 on the same lists: nothing is compiled here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from operator import neg
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024
"""Keys that are multiplied at once: half a MiB of scores of 128 queries. With 2048 it took 5% longer."""

_BOUND = 40.0
"""Largest score from which no maximum is taken off: exp(40) = 2e17 leaves room for sums, exp(-40) is no subnormal."""

_NEVER = float("-inf")


def cpu_path(dtype: torch.dtype) -> tuple[str, str]:
    """How that dtype is computed, "products" or "fused", and the reason."""
    if dtype != torch.bfloat16:
        return "products", f"{dtype} is multiplied as float32, in two matrix products"
    if _multiplies_bfloat16():
        return "fused", "the processor multiplies bfloat16, and aten's attention keeps it"
    return "products", "the processor does not multiply bfloat16: as float32, two matrix products are faster"


@cache
def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    blocks: Tensor,
    rows: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    key_blocks: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and logarithm of the sums, arguments as in the operator, `rows` int64 ``[B, H]`` from its pattern."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    path, _ = cpu_path(query.dtype)
    dtype = torch.float32 if path == "products" else query.dtype
    output = query.new_zeros(query.shape)
    lse = torch.full(query.shape[:3], _NEVER)
    plans: dict[int, _Plan] = {}
    scratch = _Scratch(block_size, query.shape[3], dtype)
    for b in range(batch):
        for h in range(heads):
            row = int(rows[b, h])
            tokens = None if order is None else order[row % len(order)].long()
            places = key.shape[2] if tokens is None else len(tokens)
            if row not in plans:
                plans[row] = _plan(counts[row], blocks[row], key_blocks, block_size, places)
            bias = None if key_bias is None else key_bias[b % len(key_bias), h % key_bias.shape[1]]
            head = _Head(
                _place(query[b, h].to(dtype), tokens, block_size),
                _place(key[b, h // group].to(dtype), tokens, block_size),
                _place(value[b, h // group].to(dtype), tokens, block_size),
                _place_bias(bias, tokens, places, key_blocks, block_size),
                places,
                block_size,
                scale,
            )
            in_place = tokens is None and dtype == query.dtype and len(head.query) == queries
            placed = output[b, h] if in_place else torch.zeros_like(head.query)
            sums = _attend_head(head, plans[row], path, placed, scratch)
            if tokens is None:
                lse[b, h] = sums[:queries]
                if not in_place:
                    output[b, h] = placed[:queries]
            else:
                held = (tokens >= 0).nonzero().squeeze(1)
                output[b, h, tokens[held]] = placed[held].to(query.dtype)
                lse[b, h, tokens[held]] = sums[held]
    return output, lse


class _Head(NamedTuple):
    """One head in the order of its positions, whole blocks; bias ``[P]`` is None where no key is masked."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    places: int
    block_size: int
    scale: float


def _place(rows: Tensor, tokens: Tensor | None, block_size: int) -> Tensor:
    """Rows of tokens at their positions, the last block filled up."""
    if tokens is not None:
        rows = rows.index_select(0, tokens.clamp(min=0)) if len(rows) else rows.new_zeros((len(tokens), rows.shape[1]))
    missing = -len(rows) % block_size
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()


def _place_bias(
    bias: Tensor | None, tokens: Tensor | None, places: int, key_blocks: int, block_size: int
) -> Tensor | None:
    """The bias of each position, -inf where none stands; None if it is 0 wherever a key is read."""
    empty = None if tokens is None else tokens < 0
    if bias is None and key_blocks * block_size <= places and (empty is None or not bool(empty.any())):
        return None
    placed = torch.full((-(-places // block_size) * block_size,), _NEVER)
    placed[:places] = 0
    if bias is not None and len(bias):
        placed[:places] = bias if tokens is None else bias[tokens.clamp(min=0)]
    if empty is not None:
        placed[:places].masked_fill_(empty, _NEVER)
    return placed


class _Plan(NamedTuple):
    """What the query blocks of a row read, those with most keys first, those with none left out.

    `blocks` int64 [n] are the query blocks, `keys` int64 [n, W] their key blocks and then the tail's, `lengths` the
    numbers of their keys; `governed` is the number of positions that the lists hold for.
    """

    blocks: Tensor
    keys: Tensor
    lengths: list[int]
    governed: int


def _plan(counts: Tensor, blocks: Tensor, key_blocks: int, block_size: int, places: int) -> _Plan:
    tail = torch.arange(key_blocks, max(-(-places // block_size), key_blocks))
    listed = torch.where(torch.arange(blocks.shape[1]) < counts[:, None], blocks, 0).long()
    index = F.pad(listed, (0, len(tail)))
    index.scatter_(1, counts[:, None].long() + torch.arange(len(tail)), tail.expand(len(index), -1))
    lengths = counts.long() * block_size + max(places - key_blocks * block_size, 0)
    falling = lengths.argsort(descending=True, stable=True)[: int((lengths > 0).sum())]
    return _Plan(falling, index[falling], lengths[falling].tolist(), len(counts) * block_size)


def _attend_head(head: _Head, plan: _Plan, path: str, output: Tensor, scratch: _Scratch) -> Tensor:
    """Write the output ``[P, D]``, which is zero, and return the logarithms of the sums ``[P]``, by position."""
    lse = torch.full(head.query.shape[:1], _NEVER)
    dense = slice(min(plan.governed, len(output)), len(output))
    if dense.start < dense.stop and head.places:
        keys = slice(0, head.places)
        bias = None if head.bias is None else head.bias[None, keys]
        output[dense], lse[dense] = _fused(
            head.query[None, dense], head.key[None, keys], head.value[None, keys], bias, head.scale
        )
    if plan.lengths:
        attend = _products if path == "products" else _fused_batches
        sums = attend(head, plan, output.view(-1, head.block_size, output.shape[1]), scratch)
        lse.view(-1, head.block_size)[plan.blocks] = sums
    return lse


def _products(head: _Head, plan: _Plan, output: Tensor, scratch: _Scratch) -> Tensor:
    """Two products for some keys at a time, with a running maximum in between unless all scores are small.

    Output is ``[Q, size, D]``; the logarithms that are returned are ``[n, size]`` in the plan's order.
    """
    size, small = head.block_size, _scores_are_small(head)
    # Threads meet after each operator: with two blocks for each, on two threads, all took 5% less, on one 3% more.
    threads = torch.get_num_threads()
    together = threads if threads == 1 else 2 * threads
    queries, keys, values = (t.view(-1, size * t.shape[1]) for t in (head.query, head.key, head.value))
    total = torch.zeros(len(plan.lengths), size, 1)
    peak = torch.full(total.shape, 0.0 if small else torch.finfo(total.dtype).min)
    parts = (t.split(together) for t in (plan.blocks, plan.keys, total, peak))
    for first, (blocks, index, t, p) in zip(range(0, len(total), together), zip(*parts, strict=True), strict=True):
        lengths = plan.lengths[first : first + together]
        bias = _gathered_bias(head, index, lengths)
        q_rows, q, o = scratch.queries(len(lengths))
        torch.index_select(queries, 0, blocks, out=q_rows)
        for start, number in _chunks(lengths[0], size):
            part = index[:, start // size : -(-(start + number) // size)].flatten()
            k_rows, v_rows, k, v, scores = scratch.keys(len(lengths), number)
            # Both are copied before anything is multiplied: with a copy between the products it took a tenth longer.
            torch.index_select(keys, 0, part, out=k_rows)
            torch.index_select(values, 0, part, out=v_rows)
            torch.baddbmm(scores, q, k, beta=0, alpha=head.scale, out=scores)
            if bias is not None:
                scores.add_(bias[:, None, start : start + number])
            if not small:
                higher = torch.maximum(p, scores.amax(2, keepdim=True))
                scores.sub_(higher)
                shrink = p.sub_(higher).exp_()
                t.mul_(shrink)
                if start:
                    o.mul_(shrink)
                p.copy_(higher)
            t.add_(scores.exp_().sum(2, keepdim=True))
            o.baddbmm_(scores, v, beta=1 if start else 0)
        output.index_copy_(0, blocks, o.div_(t.clamp(min=torch.finfo(t.dtype).tiny)))
    return peak.add_(total.log_()).squeeze(2)


def _chunks(length: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Starts and numbers of keys: equal chunks of whole blocks, but for the last."""
    step = -(-length // -(-length // _CHUNK))
    step = -(-step // block_size) * block_size
    return ((start, min(length - start, step)) for start in range(0, length, step))


class _Scratch:
    """Memory for what is gathered and for scores, used again: fresh pages cost more than the arithmetic."""

    def __init__(self, block_size: int, width: int, dtype: torch.dtype) -> None:
        self._block_size = block_size
        self._width = width
        self._dtype = dtype
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def queries(self, together: int) -> tuple[Tensor, ...]:
        """Rows to gather blocks of queries in, the same as ``[G, size, D]``, and as much for their output."""
        if (together,) not in self._views:
            shape = (together, self._block_size, self._width)
            query, output = (self._memory(name, math.prod(shape)).view(shape) for name in ("query", "output"))
            self._views[(together,)] = query.view(together, -1), query, output
        return self._views[(together,)]

    def keys(self, together: int, number: int) -> tuple[Tensor, ...]:
        """Rows to gather blocks of keys and values in, the same as ``[G, D, n]`` and ``[G, n, D]``, and scores."""
        if (together, number) not in self._views:
            blocks = together * -(-number // self._block_size)
            rows = [self._memory(name, blocks * self._block_size * self._width) for name in ("key", "value")]
            key, value = (part.view(together, -1, self._width)[:, :number] for part in rows)
            scores = self._memory("scores", together * self._block_size * number)
            self._views[together, number] = (
                *(part.view(blocks, -1) for part in rows),
                key.mT,
                value,
                scores.view(together, self._block_size, number),
            )
        return self._views[together, number]

    def _memory(self, name: str, number: int) -> Tensor:
        if name not in self._held or len(self._held[name]) < number:
            self._held[name] = torch.empty(number, dtype=self._dtype)
        return self._held[name][:number]


def _fused_batches(head: _Head, plan: _Plan, output: Tensor, scratch: _Scratch) -> Tensor:
    """The same by aten's attention over the gathered keys, of lists that are equally long."""
    size, threads = head.block_size, torch.get_num_threads()
    queries, keys, values = (t.view(-1, size * t.shape[1]) for t in (head.query, head.key, head.value))
    lse = torch.empty(len(plan.lengths), size)
    start = 0
    while start < len(lse):
        length = plan.lengths[start]
        stop = bisect_right(plan.lengths, -length, start, min(start + threads, len(lse)), key=neg)
        blocks, index = plan.blocks[start:stop], plan.keys[start:stop, : -(-length // size)]
        q_rows, q, _ = scratch.queries(len(blocks))
        k_rows, v_rows, k, v, _ = scratch.keys(len(blocks), length)
        torch.index_select(queries, 0, blocks, out=q_rows)
        torch.index_select(keys, 0, index.flatten(), out=k_rows)
        torch.index_select(values, 0, index.flatten(), out=v_rows)
        bias = _gathered_bias(head, index, plan.lengths[start:stop])
        output[blocks], lse[start:stop] = _fused(q, k.mT, v, bias, head.scale)
        start = stop
    return lse


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of ``[G, m, D]`` to ``[G, n, D]``: output ``[G, m, D]`` and logarithms ``[G, m]``."""
    mask = None if bias is None else bias[None, :, None, :].expand(1, -1, q.shape[1], -1)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], attn_mask=mask, scale=scale
    )
    if bias is not None:  # aten gives 0 where every key is masked
        lse = lse.masked_fill((bias == _NEVER).all(1)[None, :, None], _NEVER)
    return output[0], lse[0]


def _gathered_bias(head: _Head, index: Tensor, lengths: list[int]) -> Tensor | None:
    """The bias ``[G, keys]`` of gathered keys, -inf behind the end of the shorter lists."""
    if head.bias is None and lengths[-1] == lengths[0]:
        return None
    index = index[:, : -(-lengths[0] // head.block_size)]
    if head.bias is not None:
        bias = head.bias.view(-1, head.block_size)[index].flatten(1)
    else:
        bias = torch.zeros(index.shape[0], index.shape[1] * head.block_size)
    for own, length in zip(bias, lengths, strict=True):
        own[length:] = _NEVER
    return bias[:, : lengths[0]]


def _scores_are_small(head: _Head) -> bool:
    """Whether no score of the head can be larger than the bound: by the norms, |q k| <= |q| |k|."""
    if not (len(head.query) and len(head.key)):
        return True
    largest = abs(head.scale) * head.query.norm(dim=1).amax() * head.key.norm(dim=1).amax()
    if head.bias is not None:
        largest += head.bias.masked_fill(head.bias == _NEVER, 0).abs().amax()
    return bool(largest <= _BOUND)
