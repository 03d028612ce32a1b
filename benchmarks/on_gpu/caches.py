"""One decode step's attention of an 8B decoder (32 query heads, 8 of keys, 128 channels) to packed and split caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.benchmarks.on_gpu.measure import Case, Goal, relative_error, sets_for
from graphwright.kernels.packed_cache import packings, quantize
from graphwright.kernels.quantized_cache_attention import quantized_cache_attention
from graphwright.kernels.quantized_cache_attention import reference as packed_reference
from graphwright.kernels.window_cache import slots_for
from graphwright.kernels.window_cache_attention import reference as window_reference
from graphwright.kernels.window_cache_attention import window_cache_attention

QUERY_HEADS, HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
BATCHES = ((1, 8192), (1, 32768), (1, 131072), (16, 8192), (16, 32768))
CONTEXTS = (8192, 32768, 131072)
FIXED = 48 << 30
"""Bytes of caches that a case may hold on the device."""


def packed() -> Iterator[Case]:
    """Packed caches of 8, 4 and 2 bits against attention to the whole cache in bfloat16."""
    for batch, context in BATCHES:
        whole = 2 * 2 * batch * HEADS * context * HEAD_DIM
        many = min(sets_for(whole // 4), max(1, FIXED // (3 * whole)))
        query = _random(many, batch, QUERY_HEADS, 1)
        caches = [_random(2, batch, HEADS, context) for _ in range(many)]
        for bits, mode in ((8, "per_token"), (4, "per_token"), (4, "kivi"), (2, "per_token")):
            yield _packed_case(query, caches, bits, mode)


def _packed_case(query: Tensor, caches: list[Tensor], bits: int, mode: str) -> Case:
    batch, context = caches[0].shape[1], caches[0].shape[3]
    stores = [_stores(cache, bits, mode) for cache in caches]
    arguments = (torch.tensor([context - 1], device="cuda"), bits, bits, mode, HEAD_DIM, SCALE)
    return Case(
        "quantized_cache_attention",
        f"batch {batch}, {context} tokens, {bits} bits, {mode}",
        {
            "packed": lambda i: quantized_cache_attention(query[i], *stores[i], *arguments),
            "bf16": lambda i: F.scaled_dot_product_attention(query[i], *caches[i], enable_gqa=True),
        },
        check=lambda y: _head_error(y, query[0], *stores[0], *arguments),
        moved=sum(store.numel() for store in stores[0]),
        operations=4 * batch * QUERY_HEADS * context * HEAD_DIM,
        goals=(Goal("bf16", {8: 1.2, 4: 1.5, 2: 1.5}[bits]),),
        sets=len(caches),
    )


def split() -> Iterator[Case]:
    """RazorAttention's step: some heads keep all tokens, the others sinks, a mean and a fifth of the context."""
    for context in CONTEXTS:
        yield _split_case(context, sinks=4, protected=2)


def _split_case(context: int, sinks: int, protected: int) -> Case:
    others, kept = HEADS - protected, QUERY_HEADS // HEADS * protected
    slots = slots_for(sinks, max(4000, context // 5), torch.bfloat16)
    share = (protected * context + others * slots) / (HEADS * context)
    many = sets_for(2 * 2 * HEADS * context * HEAD_DIM // 4)
    query, key, value = (_random(many, 1, *sizes) for sizes in ((QUERY_HEADS, 1), (HEADS, context), (HEADS, context)))
    stores, new = ([_random(many, 1, others, count) for _ in range(2)] for count in (slots, 1))
    for store in stores:
        # The first two slots hold a mean in float32.
        mean = torch.randn(many, 1, others, HEAD_DIM, device="cuda").view(torch.bfloat16)
        store[:, :, :, :2] = mean.view(many, 1, others, 2, HEAD_DIM)
    last = torch.tensor([context - 1], device="cuda")

    def windows(i: int) -> tuple[Tensor, ...]:
        return query[i][:, kept:], stores[0][i], stores[1][i], new[0][i], new[1][i], last

    def whole(i: int) -> Tensor:
        held = (tensor[i][:, :protected] for tensor in (key, value))
        return F.scaled_dot_product_attention(query[i][:, :kept], *held, enable_gqa=True)

    return Case(
        "split cache (RazorAttention)",
        f"{context} tokens, {protected} of {HEADS} heads whole, {share:.0%} of the bytes",
        {
            "split": lambda i: (whole(i), window_cache_attention(*windows(i), sinks, SCALE, True)),
            "windows alone": lambda i: window_cache_attention(*windows(i), sinks, SCALE, True),
            "bf16": lambda i: F.scaled_dot_product_attention(query[i], key[i], value[i], enable_gqa=True),
        },
        check=lambda y: relative_error(y[1], window_reference(*windows(0), sinks, SCALE, True)),
        moved=round(share * 2 * 2 * HEADS * context * HEAD_DIM),
        operations=4 * QUERY_HEADS * context * HEAD_DIM,
        goals=(Goal("bf16", 1 / (1.2 * share)),),
        sets=many,
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, HEAD_DIM, device="cuda", dtype=torch.bfloat16)


def _stores(cache: Tensor, bits: int, mode: str) -> tuple[Tensor, Tensor]:
    """Key and value stores of a whole cache [2, B, H, C, D]."""
    made = []
    for tokens, packing in zip(cache, packings(mode, bits, bits, HEAD_DIM, HEAD_DIM), strict=True):
        planes = []
        # A sequence at a time: rounding needs float32.
        for sequence in tokens:
            codes, steps = quantize(sequence, packing)
            parts = [codes.flatten(1), steps.flatten(1).view(torch.uint8)]
            if packing.has_tail:
                parts.append(sequence[:, -32:].half().flatten(1).view(torch.uint8))
            planes.append(torch.cat(parts, -1))
        made.append(torch.stack(planes))
    return made[0], made[1]


def _head_error(y: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> float:
    """On the first and the last sequence, the first head of keys."""
    group = QUERY_HEADS // HEADS
    errors = []
    for sequence in {0, len(query) - 1}:
        at = slice(sequence, sequence + 1)
        wanted = packed_reference(query[at, :group].float(), key[at, :1], value[at, :1], *rest)
        errors.append(relative_error(y[at, :group], wanted))
    return max(errors)
