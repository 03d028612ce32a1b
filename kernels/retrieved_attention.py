"""Attention of each query to the pages that it, or the query before it, chose: what an offloaded cache must equal.

    probe[m, i]  = query[i] where group m turned away from query[i - 1], else query[i - 1]          (``page_scores.py``)
    pages[m, i]  = sinks, recent pages, best candidates at position i by the scores of probe[m, i]  (``paging.py``)
    y[h, i]      = sum_j softmax_j(scale query[h, i] . key[j]) value[j]     over tokens j <= positions[i] of those pages

Here the whole cache is at hand and nothing moves: one gather by a mask. It says what FreeKV computes, whatever is moved
when, and it reads a text as decoding would in one call, since query i knows query i - 1.

Shapes: query ``[B, Hq, N, D]``; key and value ``[B, H, L, D]``, H divides Hq; positions ``[N]``, consecutive; previous
``[B, Hq, D]``, the query before the first one, which counts if known ``[1]`` is ``positions[0]`` (0: there is none, the
first query is its own probe); starts ``[B]`` or None, the position of each sequence's first token: what is before is
padding. y ``[B, Hq, N, D]``; further results: the last query ``[B, Hq, D]``, and ``[1]``, the position that it is
previous to. Dtypes: float32, float16 or bfloat16; positions, known and starts int64. A query that is padding itself
sees itself.

Source: FreeKV (Liu et al. 2025, arXiv 2505.13109), section 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .page_scores import best_pages, page_scores, require_pooling, summarize, turned
from .paging import Paging

CONTRACT = Contract(
    "retrieved_attention",
    {
        "query": Argument("B Q N D", FLOATS),
        "key": Argument("B H L D", FLOATS),
        "value": Argument("B H L D", FLOATS),
        "positions": Argument("N", (torch.int64,)),
        "previous": Argument("B Q D", FLOATS),
        "known": Argument("1", (torch.int64,)),
        "starts": Argument("B", (torch.int64,), optional=True),
    },
    sizes={"Q": Size(minimum=1, multiple_of="H")},
)
QUERIES = 128
"""Queries whose masks are made at a time."""


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    previous: Tensor,
    known: Tensor,
    starts: Tensor | None,
    page: int,
    slots: int,
    sinks: int,
    window: int,
    tau: float,
    pooling: str,
    scaled: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, a block of queries at a time; on any device."""
    call = _Call(
        query, key, value, positions, previous, known, starts, page, slots, sinks, window, tau, pooling, scaled, scale
    )
    paging = call.require()
    if query.shape[2] == 0:
        return query.clone(), previous.clone(), known.clone()
    batch, heads, length, _ = key.shape
    pages = paging.pages_for(length)
    padded = functional.pad(key, (0, 0, 0, pages * page - length))
    j = torch.arange(length, device=key.device)
    first = paging.first_pages(starts, batch, key.device)
    begin = torch.zeros_like(first) if starts is None else starts
    real = None if starts is None else torch.arange(pages * page, device=key.device) >= starts[:, None]
    summary = summarize(padded.unflatten(2, (pages, page)), None if real is None else real.view(batch, 1, pages, page))
    before = torch.cat((previous.to(query.dtype).unsqueeze(2), query[:, :, :-1]), 2)
    away = turned(query, before, heads, tau)
    away[:, :, 0] |= known != positions[0]
    outputs = []
    for low in range(0, query.shape[2], QUERIES):
        rows, part = slice(low, low + QUERIES), positions[low : low + QUERIES]
        repeats = query.shape[1] // heads
        probe = torch.where(
            away[:, :, rows].repeat_interleave(repeats, 1).unsqueeze(-1), query[:, :, rows], before[:, :, rows]
        )
        scores = page_scores(summary, probe, paging.candidates(part, first, pages).unsqueeze(1), pooling, scaled)
        seen = best_pages(scores, paging.chosen) | paging.always(part, first, pages).unsqueeze(1)
        mask = seen.repeat_interleave(page, -1)[..., :length] & (j >= begin[:, None]).view(batch, 1, 1, length)
        mask = (mask & (j <= part[:, None])) | (j == part[:, None])
        outputs.append(_attend(query[:, :, rows], key, value, mask.repeat_interleave(repeats, 1), scale))
    return torch.cat(outputs, 2), query[:, :, -1].clone(), positions[-1:] + 1


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    # What was never written may be anything, and zero times NaN is no zero.
    value = torch.where(mask.any(2).any(1)[:, None, :, None], value, 0.0)
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


@torch.library.custom_op("graphwright::retrieved_attention", mutates_args=())
def retrieved_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    previous: Tensor,
    known: Tensor,
    starts: Tensor | None,
    page: int,
    slots: int,
    sinks: int,
    window: int,
    tau: float,
    pooling: str,
    scaled: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to chosen pages of ``page`` tokens, at most ``slots`` with ``sinks`` first and ``window`` last ones.

    Raises:
        InvalidArgument: A dtype, shape or number of pages that cannot be, or an unknown pooling.
        MissingKernel: No kernel for the query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


@retrieved_attention.register_fake
def _fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(*arguments, **named)
    call.require(proved=False)
    return torch.empty_like(call.query), call.previous.new_empty(call.previous.shape), torch.empty_like(call.known)


class _Call(NamedTuple):
    """The operator's arguments, as they are handed to its kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    previous: Tensor
    known: Tensor
    starts: Tensor | None
    page: int
    slots: int
    sinks: int
    window: int
    tau: float
    pooling: str
    scaled: bool
    scale: float

    def require(self, proved: bool = True) -> Paging:
        """How the cache is paged, once all arguments were checked."""
        CONTRACT.require(**{name: getattr(self, name) for name in CONTRACT.arguments}, proved=proved)
        require_pooling(self.pooling)
        paging = Paging(self.page, self.slots, self.sinks, self.window)
        paging.require()
        return paging


# Plain torch is all there is on either device: this operator is the measure of others, and reads what they leave out.
torch.library.impl("graphwright::retrieved_attention", "cpu", reference)
torch.library.impl("graphwright::retrieved_attention", "cuda", reference)
register(torch.ops.graphwright.retrieved_attention.default, reference, CONTRACT)
