"""Which page lies in which slot of a fast pool, for each sequence and head, and back; and what is counted on the way.

    tables int32 [B, H, S + P]       table   [B, H, S]   the page in a slot, -1 where it is free
                                     inverse [B, H, P]   the slot of a page, -1 where it is not at hand

Slots of one physical page may hold different pages for different heads. `place` makes room: each page that is wanted
and not at hand gets, in ascending order, a slot that is free, or else one whose page is not wanted; slots are taken in
ascending order, free ones first. Pages that are wanted and at hand stay where they are.

    counts int64 [10], by the names of `Count`; zeros at first

Source: FreeKV (Liu et al. 2025, arXiv 2505.13109), section 4.2: tables by head, only missing pages move.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidArgument


class Count(IntEnum):
    """Places in `counts`. All but the first two are sums since the last reset."""

    NEXT = 0
    """The position that the pages at hand and the previous query are for; 0 where there are none."""
    WRITTEN = 1
    """Tokens that were appended."""
    STEPS = 2
    """Times that pages were chosen for a next step."""
    HEADS = 3
    """Heads (of all sequences) that were compared with their previous query."""
    CORRECTED = 4
    """Heads of these that had turned away, and waited for their own choice."""
    CHOSEN = 5
    """Pages that were chosen among candidates."""
    HIT = 6
    """Pages of these that were at hand."""
    MOVED = 7
    """Pages (of one head each) that came from the slow pool."""
    BYTES = 8
    """Bytes of these."""
    STALLED = 9
    """Nanoseconds that steps waited: for pages on their way, and while heads were corrected."""


class Plan(NamedTuple):
    """Pages that get a slot, one a row: sequences, heads, slots and pages, int64 [n] each."""

    batch: NDArray[np.int64]
    head: NDArray[np.int64]
    slot: NDArray[np.int64]
    page: NDArray[np.int64]

    def of(self, rows: NDArray[np.bool_]) -> Plan:
        """The rows where a mask [n] holds."""
        return Plan(*(column[rows] for column in self))

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The columns as tensors, to index with."""
        batch, head, slot, page = (torch.from_numpy(column) for column in self)
        return batch, head, slot, page


def empty_tables(batch: int, heads: int, slots: int, pages: int, device: torch.device) -> Tensor:
    """Tables of a pool that holds nothing."""
    return torch.full((batch, heads, slots + pages), -1, dtype=torch.int32, device=device)


def empty_counts(device: torch.device) -> Tensor:
    """Counts of a pool that holds nothing."""
    return torch.zeros(len(Count), dtype=torch.int64, device=device)


def split_tables(tables: Tensor, slots: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Table and inverse as arrays that share the tensor's memory."""
    array = tables.numpy()
    return array[..., :slots], array[..., slots:]


def place(tables: Tensor, slots: int, wanted: NDArray[np.bool_]) -> Plan:
    """Choose slots for the pages [B, H, P] that are wanted and not at hand, and free them; `settle` enters them.

    Raises:
        InvalidArgument: More pages are wanted than there are slots.
    """
    table, inverse = split_tables(tables, slots)
    missing = wanted & (inverse < 0)
    batch, head, page = np.nonzero(missing)
    if len(page) == 0:
        return Plan(batch, head, page, page)
    # 0 free, 1 not wanted, 2 wanted: what may be taken comes first, and a stable sort keeps slots in order.
    kept = np.take_along_axis(wanted, np.maximum(table, 0).astype(np.int64), -1)
    rank = np.where(table < 0, 0, np.where(kept, 2, 1))
    order = np.argsort(rank, -1, kind="stable")
    number = missing.cumsum(-1)[batch, head, page] - 1
    if number.max() >= slots:
        raise InvalidArgument(f"{int(wanted.sum(-1).max())} pages are wanted at hand, there are {slots} slots")
    slot = order[batch, head, number]
    if (rank[batch, head, slot] == 2).any():
        raise InvalidArgument(f"{int(wanted.sum(-1).max())} pages are wanted at hand, there are {slots} slots")
    old = table[batch, head, slot]
    gone = old >= 0
    inverse[batch[gone], head[gone], old[gone]] = -1
    table[batch, head, slot] = -1
    return Plan(batch, head, slot, page)


def settle(tables: Tensor, slots: int, plan: Plan) -> None:
    """Enter pages whose slots were filled."""
    table, inverse = split_tables(tables, slots)
    table[plan.batch, plan.head, plan.slot] = plan.page
    inverse[plan.batch, plan.head, plan.page] = plan.slot


def forget(tables: Tensor, slots: int, page: int) -> None:
    """Drop a page and all that follow: they are about to be written anew."""
    table, inverse = split_tables(tables, slots)
    table[table >= page] = -1
    inverse[..., page:] = -1
