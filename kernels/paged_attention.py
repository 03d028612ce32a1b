"""Attention of one new token to the pages that are at hand: paged, with a page table for each head.

    y[h] = sum_{s, t} softmax_{s, t}(scale q[h] . k[s, t, m]) v[s, t, m]         m = h H // Hq, the head's key head

over slots s that hold a page for head m, and tokens t of that page at positions from starts to the token's own.

Shapes: query ``[B, Hq, 1, D]``, H divides Hq; fast ``[B, S, 2, page, H, D]``; tables ``[B, H, S + P]``
(``page_tables.py``); positions ``[1]``; starts ``[B]`` or None, the position of each sequence's first token: what is
before is padding; y ``[B, Hq, 1, D]``. Dtypes: query, fast and y one of float32, float16, bfloat16, tables int32,
positions and starts int64. A query that is padding itself sees itself. Its page is at hand: it was appended before.

Kernels differ from the reference by float32 rounding of sums of D and of S page terms. Slots are in no order of tokens,
so the sum over tokens is associated otherwise than attention over a whole cache does it.

Source: FreeKV (Liu et al. 2025, arXiv 2505.13109), section 4.2; paging: PagedAttention (Kwon et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register

CONTRACT = Contract(
    "paged_attention",
    {
        "query": Argument("B Q one D", FLOATS),
        "fast": Argument("B S 2 page H D", FLOATS),
        "tables": Argument("B H R", (torch.int32,)),
        "positions": Argument("one", (torch.int64,)),
        "starts": Argument("B", (torch.int64,), optional=True),
    },
    sizes={
        "2": Size(minimum=2, maximum=2),
        "one": Size(minimum=1, maximum=1),
        "Q": Size(minimum=1, multiple_of="H"),
    },
    devices=("cpu",),
)


def reference(
    query: Tensor, fast: Tensor, tables: Tensor, positions: Tensor, starts: Tensor | None, scale: float
) -> Tensor:
    """The formula, head by head."""
    CONTRACT.require(query=query, fast=fast, tables=tables, positions=positions, starts=starts)
    slots, page, heads = fast.shape[1], fast.shape[3], fast.shape[4]
    position, repeats = int(positions), query.shape[1] // heads
    y = torch.empty_like(query)
    for b in range(len(query)):
        begin = 0 if starts is None else int(starts[b])
        for h in range(query.shape[1]):
            m = h // repeats
            token = tables[b, m, :slots, None].long() * page + torch.arange(page, device=fast.device)
            seen = (tables[b, m, :slots, None] >= 0) & (token <= position) & ((token >= begin) | (token == position))
            keys, values = fast[b, :, 0, :, m][seen].float(), fast[b, :, 1, :, m][seen].float()
            weights = (keys @ query[b, h, 0].float() * scale).softmax(0)
            y[b, h, 0] = (weights @ values).to(y.dtype)
    return y


@torch.library.custom_op("graphwright::paged_attention", mutates_args=())
def paged_attention(
    query: Tensor, fast: Tensor, tables: Tensor, positions: Tensor, starts: Tensor | None, scale: float
) -> Tensor:
    """Attention of queries ``[B, Hq, 1, D]`` to what a fast pool holds for their heads.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for the query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


@paged_attention.register_fake
def _fake(
    query: Tensor, fast: Tensor, tables: Tensor, positions: Tensor, starts: Tensor | None, scale: float
) -> Tensor:
    CONTRACT.require(query=query, fast=fast, tables=tables, positions=positions, starts=starts, proved=False)
    return torch.empty_like(query)


def _cpu(query: Tensor, fast: Tensor, tables: Tensor, positions: Tensor, starts: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention on the pool as it lies: a row of values follows a row of keys by one page.

    Rows of values are looked at as keys too, and hidden: that is quicker than copying the rows of keys together. The
    query heads that share a key head are its queries, so each row is read once.
    """
    _require(query, fast, tables, positions, starts)
    batch, slots, _, page, heads, dim = fast.shape
    held, position = tables[..., :slots, None], int(positions)
    token = held.long() * page + torch.arange(page)  # [B, H, S, page]
    seen = (held >= 0) & (token <= position)
    if starts is not None:
        seen &= (token >= starts.view(batch, 1, 1, 1)) | (token == position)
    seen = torch.stack((seen, torch.zeros_like(seen)), 3).flatten(2)[:, :, None, :-page]
    rows = fast.view(batch, slots * 2 * page, heads, dim).transpose(1, 2)
    grouped = query.view(batch, heads, -1, dim)
    y = functional.scaled_dot_product_attention(grouped, rows[:, :, :-page], rows[:, :, page:], seen, scale=scale)
    return y.view(query.shape)


_require = CONTRACT.requirement()

torch.library.impl("graphwright::paged_attention", "cpu", _cpu)
register(torch.ops.graphwright.paged_attention.default, reference, CONTRACT)
