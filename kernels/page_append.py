"""Append new tokens to a key-value cache that is kept in pages: near ones in a fast pool, complete ones in a slow one.

    a token at position i is of page i // page; a page that becomes complete is summarized and stored in the slow pool

Shapes: fast ``[B, S, 2, page, H, D]``, S slots of a page of keys and values, as projections emit them; slow
``[B, P, H, 2, page, D]``, where a page of one head is one piece; summary ``[B, H, P, 2, D]`` (``page_scores.py``);
tables and counts as in ``page_tables.py``; positions ``[T]``, consecutive; key and value ``[B, H, T, D]``; starts
``[B]`` or None, the position of each sequence's first token. Dtypes: fast, slow, summary, key and value one of float32,
float16, bfloat16; tables int32, the others int64.

After it sinks and recent pages among those that were written are at hand. Other pages at hand stay where there is room.
What was at hand of the written pages, and of pages after them, is dropped: a conversation may start again at any
position. Appending tokens one by one, in pieces or at once leaves the same cache, up to which slots pages lie in.

``page_append_`` does it in place, in the pool that ``slow_pool.py`` finds behind ``slow``: first it reserves the room
there, so a full disk is refused before anything changes, and waits for what is on its way to the fast pool.

Source: FreeKV (Liu et al. 2025, arXiv 2505.13109), section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .page_scores import summarize
from .page_tables import Count, forget, place, settle, split_tables
from .paging import Paging, sizes_of
from .slow_pool import FilePool, TensorPool, pool_of

CONTRACT = Contract(
    "page_append",
    {
        "fast": Argument("B S 2 page H D", FLOATS),
        "slow": Argument("B P H 2 page D", FLOATS),
        "summary": Argument("B H P 2 D", FLOATS),
        "tables": Argument("B H R", (torch.int32,)),
        "counts": Argument("C", (torch.int64,)),
        "positions": Argument("T", (torch.int64,)),
        "key": Argument("B H T D", FLOATS),
        "value": Argument("B H T D", FLOATS),
        "starts": Argument("B", (torch.int64,), optional=True),
    },
    sizes={"2": Size(minimum=2, maximum=2), "C": Size(minimum=len(Count), maximum=len(Count))},
    devices=("cpu",),
)
_States = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_STATES = 5
"""The first arguments are the state."""


def reference(
    fast: Tensor,
    slow: Tensor,
    summary: Tensor,
    tables: Tensor,
    counts: Tensor,
    positions: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    sinks: int,
    window: int,
) -> _States:
    """The state after the tokens were appended, token by token."""
    paging = _Call(fast, slow, summary, tables, counts, positions, key, value, starts, sinks, window).require()
    fast, slow, summary, tables, counts = (tensor.clone() for tensor in (fast, slow, summary, tables, counts))
    table, inverse = tables[..., : paging.slots], tables[..., paging.slots :]
    first = paging.first_pages(starts, len(key), key.device)
    for number, position in enumerate(positions.tolist()):
        page, offset = divmod(position, paging.page)
        stale = page if offset == 0 else page + 1
        table[table >= stale] = -1
        inverse[..., stale:] = -1
        always = paging.always(position, first, slow.shape[1])
        for b, h in np.ndindex(*table.shape[:2]):
            if inverse[b, h, page] < 0:
                held = enumerate(table[b, h].tolist())
                slot = min((at >= 0, slot) for slot, at in held if at < 0 or not always[b, at])[1]
                if table[b, h, slot] >= 0:
                    inverse[b, h, table[b, h, slot]] = -1
                table[b, h, slot], inverse[b, h, page] = page, slot
                fast[b, slot, :, :, h] = slow[b, page, h] if offset else 0
            slot = int(inverse[b, h, page])
            fast[b, slot, :, offset, h] = torch.stack((key[b, h, number], value[b, h, number]))
            if offset == paging.page - 1:
                slow[b, page, h] = fast[b, slot, :, :, h]
                real = None
                if starts is not None:
                    real = torch.arange(page * paging.page, position + 1, device=key.device) >= starts[b]
                summary[b, h, page] = summarize(fast[b, slot, 0, :, h], real)
        counts[Count.WRITTEN] += 1
    return fast, slow, summary, tables, counts


@torch.library.custom_op("graphwright::page_append", mutates_args=())
def page_append(
    fast: Tensor,
    slow: Tensor,
    summary: Tensor,
    tables: Tensor,
    counts: Tensor,
    positions: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    sinks: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fast pool, slow pool, summary, tables and counts after tokens ``[B, H, T, D]`` were appended.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold, or a position that is not in the slow pool.
        MissingKernel: No kernel for the fast pool's device.
    """
    raise missing_kernel(CONTRACT.operator, fast.device)


class _Call(NamedTuple):
    """The operator's arguments, as they are handed to its kernels."""

    fast: Tensor
    slow: Tensor
    summary: Tensor
    tables: Tensor
    counts: Tensor
    positions: Tensor
    key: Tensor
    value: Tensor
    starts: Tensor | None
    sinks: int
    window: int

    def require(self, proved: bool = True) -> Paging:
        """How the cache is paged, once all arguments were checked."""
        _require(*self[: len(CONTRACT.arguments)], sinks=self.sinks, window=self.window, proved=proved)
        return sizes_of(self.fast, self.sinks, self.window)

    def cloned(self) -> _Call:
        """The same with state of its own."""
        state = zip(self._fields, self[:_STATES], strict=False)
        return self._replace(**{name: each.clone(memory_format=torch.contiguous_format) for name, each in state})


@page_append.register_fake
def _fake(*arguments: Any, **named: Any) -> _States:
    call = _Call(*arguments, **named)
    call.require(proved=False)
    # A slow pool that is not placed yet has no memory of its own: its strides are not those of a result.
    return tuple(tensor.new_empty(tensor.shape) for tensor in call[:_STATES])  # pyright: ignore[reportReturnType]


def _cpu(*arguments: Any) -> _States:
    call = _Call(*arguments)
    paging, call = call.require(), call.cloned()
    append(call.fast, TensorPool(call.slow), *call[2:9], paging)
    return call[:_STATES]


def _cpu_in_place(*arguments: Any) -> _States:
    call = _Call(*arguments)
    paging = call.require()
    pool = pool_of(call.slow)
    waited = pool.wait()
    if waited:
        call.counts.numpy()[Count.STALLED] += waited
    append(call.fast, pool, *call[2:9], paging)
    return call[:_STATES]


def append(
    fast: Tensor,
    pool: TensorPool | FilePool,
    summary: Tensor,
    tables: Tensor,
    counts: Tensor,
    positions: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    paging: Paging,
) -> None:
    """Append in place, arguments unchecked but for positions."""
    count, pages = key.shape[2], summary.shape[2]
    if count == 0:
        return
    start = int(positions[0])
    page, offset = divmod(start, paging.page)
    last = start + count - 1
    if start < 0 or last // paging.page >= pages:
        raise InvalidArgument(
            f"page_append: positions {start} to {last} do not fit a slow pool of {pages * paging.page} tokens"
        )
    pool.reserve(last // paging.page + 1)
    _, inverse = split_tables(tables, paging.slots)
    counted = counts.numpy()
    new = torch.stack((key, value), 2)  # [B, H, 2, T, D]
    if count == 1 and offset and counted[Count.NEXT] == start and (inverse[..., page] >= 0).all():
        _append_one(fast, pool, summary, inverse, page, offset, new, starts, paging)
    else:
        _append_many(fast, pool, summary, tables, start, new, starts, paging)
    counted[Count.WRITTEN] += count


def _append_one(
    fast: Tensor,
    pool: TensorPool | FilePool,
    summary: Tensor,
    inverse: np.ndarray,
    page: int,
    offset: int,
    new: Tensor,
    starts: Tensor | None,
    paging: Paging,
) -> None:
    """A token of a page that is at hand for every head."""
    batch, heads = new.shape[:2]
    b, h = torch.arange(batch)[:, None], torch.arange(heads)
    slot = torch.from_numpy(inverse[..., page].astype(np.int64))
    fast[b, slot, :, offset, h] = new.squeeze(3)
    if offset == paging.page - 1:
        content = fast[b, slot, :, :, h].unsqueeze(2)  # [B, H, 1, 2, page, D]
        _complete(pool, summary, page, content, starts, paging)


def _append_many(
    fast: Tensor,
    pool: TensorPool | FilePool,
    summary: Tensor,
    tables: Tensor,
    start: int,
    new: Tensor,
    starts: Tensor | None,
    paging: Paging,
) -> None:
    """Any tokens: the pages that they touch are made whole, stored, and put into slots where they are near."""
    batch, heads, _, count, dim = new.shape
    page, offset = divmod(start, paging.page)
    last = start + count - 1
    touched = last // paging.page - page + 1
    content = new.new_zeros(batch, heads, 2, touched * paging.page, dim)
    _, inverse = split_tables(tables, paging.slots)
    if offset:
        content[:, :, :, : paging.page] = _page(fast, pool, inverse, page)
    content[:, :, :, offset : offset + count] = new
    content = content.unflatten(3, (touched, paging.page)).transpose(2, 3)  # [B, H, n, 2, page, D]
    complete = (last + 1) // paging.page - page
    if complete:
        _complete(pool, summary, page, content[:, :, :complete], starts, paging)
    forget(tables, paging.slots, page)
    first = paging.first_pages(starts, batch, new.device)
    always = paging.always(last, first, inverse.shape[-1])
    wanted = always.numpy()[:, None].repeat(heads, 1)
    plan = place(tables, paging.slots, wanted)
    written = plan.page >= page
    pool.load(fast, plan.of(~written))
    b, h, slot, at = plan.of(written).indices()
    fast[b, slot, :, :, h] = content[b, h, at - page]
    settle(tables, paging.slots, plan)


def _page(fast: Tensor, pool: TensorPool | FilePool, inverse: np.ndarray, page: int) -> Tensor:
    """What a page holds so far, [B, H, 2, page, D]: from the fast pool, or from the slow one where it left that."""
    slot = inverse[..., page].astype(np.int64)
    b, h = np.indices(slot.shape)
    content = fast[b, np.maximum(slot, 0), :, :, h]
    if (slot < 0).any():
        stored = pool.read(page + 1)[:, page]
        content = torch.where(torch.from_numpy(slot < 0)[..., None, None, None], stored, content)
    return content


def _complete(
    pool: TensorPool | FilePool, summary: Tensor, page: int, content: Tensor, starts: Tensor | None, paging: Paging
) -> None:
    """Store and summarize complete pages [B, H, n, 2, page, D] from `page` on."""
    count = content.shape[2]
    real = None
    if starts is not None:
        tokens = torch.arange(page * paging.page, (page + count) * paging.page)
        real = (tokens >= starts[:, None]).view(-1, 1, count, paging.page)
    pool.write(page, content)
    summary[:, :, page : page + count] = summarize(content[:, :, :, 0], real)


def _wrong(arguments: Mapping[str, Any]) -> str | None:
    fast, slow, tables = (arguments[name] for name in ("fast", "slow", "tables"))
    paging = Paging(fast.shape[3], fast.shape[1], arguments["sinks"], arguments["window"])
    if (reason := paging.refuse()) is not None:
        return reason
    if tables.shape[-1] != paging.slots + slow.shape[1]:
        return f"got tables of {tables.shape[-1]} columns, expected {paging.slots} slots and {slow.shape[1]} pages"
    return None


_require = CONTRACT.requirement(_wrong)

# Not custom_op: the in-place twin returns its arguments, as aten's do, so that they can take the place of values.
torch.library.define(
    "graphwright::page_append_",
    "(Tensor(a!) fast, Tensor(b!) slow, Tensor(c!) summary, Tensor(d!) tables, Tensor(e!) counts, Tensor positions,"
    " Tensor key, Tensor value, Tensor? starts, int sinks, int window)"
    " -> (Tensor(a!), Tensor(b!), Tensor(c!), Tensor(d!), Tensor(e!))",
)
torch.library.impl("graphwright::page_append_", "cpu", _cpu_in_place)
torch.library.impl("graphwright::page_append", "cpu", _cpu)
register(torch.ops.graphwright.page_append.default, reference, CONTRACT)
