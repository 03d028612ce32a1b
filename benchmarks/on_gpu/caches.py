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
        query = torch.randn(many, batch, QUERY_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        caches = [
            torch.randn(2, batch, HEADS, context, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(many)
        ]
        last = torch.tensor([context - 1], device="cuda")

        def dense(i: int, q: Tensor = query, c: list[Tensor] = caches) -> Tensor:
            return F.scaled_dot_product_attention(q[i], c[i][0], c[i][1], enable_gqa=True)

        for bits, mode in ((8, "per_token"), (4, "per_token"), (4, "kivi"), (2, "per_token")):
            stores = [_stores(cache, bits, mode) for cache in caches]
            arguments = (last, bits, bits, mode, HEAD_DIM, SCALE)
            yield Case(
                "quantized_cache_attention",
                f"batch {batch}, {context} tokens, {bits} bits, {mode}",
                {
                    "packed": lambda i, q=query, s=stores, a=arguments: quantized_cache_attention(q[i], *s[i], *a),
                    "bf16": dense,
                },
                check=lambda y, q=query, s=stores, a=arguments: _head_error(y, q[0], *s[0], *a),
                moved=sum(store.numel() for store in stores[0]),
                operations=4 * batch * QUERY_HEADS * context * HEAD_DIM,
                goals=(Goal("bf16", {8: 1.2, 4: 1.5, 2: 1.5}[bits]),),
                sets=many,
            )  # fmt: skip
            del stores


def split() -> Iterator[Case]:
    """RazorAttention's step: some heads keep all tokens, the others sinks, a mean and a fifth of the context."""
    sinks, protected = 4, 2
    for context in CONTEXTS:
        window = max(4000, context // 5)
        slots = slots_for(sinks, window, torch.bfloat16)
        group = QUERY_HEADS // HEADS
        others = HEADS - protected
        share = (protected * context + others * slots) / (HEADS * context)
        many = sets_for(2 * 2 * HEADS * context * HEAD_DIM // 4)

        def random(*shape: int, many: int = many) -> Tensor:
            return torch.randn(many, 1, *shape, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

        query, key, value = random(QUERY_HEADS, 1), random(HEADS, context), random(HEADS, context)
        stores, new = (random(others, slots), random(others, slots)), (random(others, 1), random(others, 1))
        for store in stores:
            # The mean's two slots hold float32, and stand for it follows in the cache's dtype.
            store[:, :, :, :2] = torch.randn(many, 1, others, HEAD_DIM, device="cuda").view(torch.bfloat16).view(many, 1, others, 2, HEAD_DIM)  # fmt: skip
        last = torch.tensor([context - 1], device="cuda")
        kept = group * protected

        def ours(i, q=query, k=key, v=value, s=stores, n=new, at=last, kept=kept):
            full = F.scaled_dot_product_attention(
                q[i][:, :kept], k[i][:, :protected], v[i][:, :protected], enable_gqa=True
            )
            rest = window_cache_attention(q[i][:, kept:], s[0][i], s[1][i], n[0][i], n[1][i], at, sinks, SCALE, True)
            return full, rest

        def windows(i, q=query, s=stores, n=new, at=last, kept=kept):
            return window_cache_attention(q[i][:, kept:], s[0][i], s[1][i], n[0][i], n[1][i], at, sinks, SCALE, True)

        yield Case(
            "split cache (RazorAttention)",
            f"{context} tokens, {protected} of {HEADS} heads whole, {share:.0%} of the bytes",
            {
                "split": ours,
                "windows alone": windows,
                "bf16": lambda i, q=query, k=key, v=value: F.scaled_dot_product_attention(
                    q[i], k[i], v[i], enable_gqa=True
                ),
            },
            check=lambda y, q=query, s=stores, n=new, at=last, kept=kept: relative_error(
                y[1],
                window_reference(q[0][:, kept:], s[0][0], s[1][0], n[0][0], n[1][0], at, sinks, SCALE, True).double(),
            ),
            moved=round(share * 2 * 2 * HEADS * context * HEAD_DIM),
            operations=4 * QUERY_HEADS * context * HEAD_DIM,
            goals=(Goal("bf16", 1 / (1.2 * share)),),
            sets=many,
        )


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
