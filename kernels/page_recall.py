"""Choose the pages of a step and bring those that are not at hand from the slow pool into the fast one.

    ahead    probe = the query of this step;  pages for the next position, all heads
    now      probe = the query of this step;  pages for this position, heads that turned away from the previous query

    wanted[m] = sinks, recent pages, best candidates by the scores of probe[m]       (``paging.py``, ``page_scores.py``)

A decode step appends, recalls *now*, attends, and recalls *ahead*: a head whose query is like the previous one attends
to pages that were chosen and fetched while the rest of the step before was computed, the others wait for their own.

Shapes: fast, slow, summary, tables, counts and starts as in ``page_append.py``; previous ``[B, Hq, D]``, the query of
the step before; query ``[B, Hq, N, D]`` and positions ``[N]``, of which the last is the step's. Only pages that are not
at hand move, and of these none that is still to be written. ``tau`` as in ``page_scores.turned``; a step that does not
follow the one before has no previous query, and all its heads choose anew. With a ``tau`` above 1 all heads always do,
so nothing is fetched ahead: that is retrieval without speculation.

``page_recall_`` does it in place: *ahead* in the background, where the pool has one; the state that it returns is then
still being written, and the next ``page_append_`` on it waits. *Now* waits for its pages.

Source: FreeKV (Liu et al. 2025, arXiv 2505.13109), sections 4.1 (speculation, correction) and 4.2 (recall).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .page_scores import best_pages, page_scores, require_pooling, turned
from .page_tables import Count, place, settle, split_tables
from .paging import Paging, sizes_of
from .slow_pool import FilePool, TensorPool, pool_of

CONTRACT = Contract(
    "page_recall",
    {
        "fast": Argument("B S 2 page H D", FLOATS),
        "tables": Argument("B H R", (torch.int32,)),
        "previous": Argument("B Q D", FLOATS),
        "counts": Argument("C", (torch.int64,)),
        "slow": Argument("B P H 2 page D", FLOATS),
        "summary": Argument("B H P 2 D", FLOATS),
        "query": Argument("B Q N D", FLOATS),
        "positions": Argument("N", (torch.int64,)),
        "starts": Argument("B", (torch.int64,), optional=True),
    },
    sizes={
        "2": Size(minimum=2, maximum=2),
        "N": Size(minimum=1),
        "Q": Size(minimum=1, multiple_of="H"),
        "C": Size(minimum=len(Count), maximum=len(Count)),
    },
    devices=("cpu",),
)
_States = tuple[Tensor, Tensor, Tensor, Tensor]
_STATES = 4
"""The first arguments are the state."""


def reference(
    fast: Tensor,
    tables: Tensor,
    previous: Tensor,
    counts: Tensor,
    slow: Tensor,
    summary: Tensor,
    query: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    sinks: int,
    window: int,
    tau: float,
    pooling: str,
    scaled: bool,
    ahead: bool,
) -> _States:
    """The state after the recall, head by head and page by page."""
    call = _Call(
        fast,
        tables,
        previous,
        counts,
        slow,
        summary,
        query,
        positions,
        starts,
        sinks,
        window,
        tau,
        pooling,
        scaled,
        ahead,
    )
    paging = call.require()
    fast, tables, previous, counts = (tensor.clone() for tensor in (fast, tables, previous, counts))
    batch, _, pages = summary.shape[:3]
    probe, position = query[:, :, -1:], int(positions[-1])
    heads = torch.ones(tables.shape[:2], dtype=torch.bool)
    if not ahead:
        heads = turned(probe, previous.unsqueeze(2), heads.shape[1], tau)[..., 0]
        heads |= int(counts[Count.NEXT]) != position
        counts[Count.HEADS] += heads.numel()
        counts[Count.CORRECTED] += int(heads.sum())
    else:
        previous.copy_(query[:, :, -1])
        position += 1
        counts[Count.NEXT] = position
        counts[Count.STEPS] += 1
    if position >= pages * paging.page or (ahead and tau > 1):
        return fast, tables, previous, counts
    first = paging.first_pages(starts, batch, query.device)
    allowed = paging.candidates(position, first, pages)
    scores = page_scores(summary, probe, allowed[:, None, None], pooling, scaled)[:, :, 0]
    table, inverse = tables[..., : paging.slots], tables[..., paging.slots :]
    for b, h in np.ndindex(*tables.shape[:2]):
        if not heads[b, h]:
            continue
        chosen = best_pages(scores[b, h], paging.chosen)
        wanted = chosen | paging.always(position, first, pages)[b]
        counts[Count.CHOSEN] += int(chosen.sum())
        counts[Count.HIT] += int((chosen & (inverse[b, h] >= 0)).sum())
        for page in wanted.nonzero().flatten().tolist():
            if inverse[b, h, page] >= 0:
                continue
            held = enumerate(table[b, h].tolist())
            slot = min((at >= 0, slot) for slot, at in held if at < 0 or not wanted[at])[1]
            if table[b, h, slot] >= 0:
                inverse[b, h, table[b, h, slot]] = -1
            table[b, h, slot], inverse[b, h, page] = page, slot
            if page < position // paging.page:
                fast[b, slot, :, :, h] = slow[b, page, h]
                counts[Count.MOVED] += 1
                counts[Count.BYTES] += slow[b, page, h].numel() * slow.element_size()
    return fast, tables, previous, counts


@torch.library.custom_op("graphwright::page_recall", mutates_args=())
def page_recall(
    fast: Tensor,
    tables: Tensor,
    previous: Tensor,
    counts: Tensor,
    slow: Tensor,
    summary: Tensor,
    query: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    sinks: int,
    window: int,
    tau: float,
    pooling: str,
    scaled: bool,
    ahead: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fast pool, tables, previous query and counts after the recall.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold, or an unknown pooling.
        MissingKernel: No kernel for the fast pool's device.
    """
    raise missing_kernel(CONTRACT.operator, fast.device)


class _Call(NamedTuple):
    """The operator's arguments, as they are handed to its kernels."""

    fast: Tensor
    tables: Tensor
    previous: Tensor
    counts: Tensor
    slow: Tensor
    summary: Tensor
    query: Tensor
    positions: Tensor
    starts: Tensor | None
    sinks: int
    window: int
    tau: float
    pooling: str
    scaled: bool
    ahead: bool

    def require(self, proved: bool = True) -> Paging:
        """How the cache is paged, once all arguments were checked."""
        _require(*self[: len(CONTRACT.arguments)], sinks=self.sinks, window=self.window, proved=proved)
        require_pooling(self.pooling)
        return sizes_of(self.fast, self.sinks, self.window)

    def run(self, paging: Paging, pool: TensorPool | FilePool) -> int:
        """Recall in place; the nanoseconds that the caller waited for pages."""
        recall = _Recall(self, paging, pool)
        return recall.ahead() if self.ahead else recall.now()


@page_recall.register_fake
def _fake(*arguments: Any, **named: Any) -> _States:
    call = _Call(*arguments, **named)
    call.require(proved=False)
    return tuple(torch.empty_like(tensor) for tensor in call[:_STATES])  # pyright: ignore[reportReturnType]


def _cpu(*arguments: Any) -> _States:
    call = _Call(*arguments)
    paging = call.require()
    call = call._replace(**{name: each.clone() for name, each in zip(call._fields, call[:_STATES], strict=False)})
    call.run(paging, TensorPool(call.slow))
    return call[:_STATES]


def _cpu_in_place(*arguments: Any) -> _States:
    call = _Call(*arguments)
    paging = call.require()
    pool = pool_of(call.slow)
    waited = pool.wait() + call.run(paging, pool)
    if waited:
        call.counts.numpy()[Count.STALLED] += waited
    return call[:_STATES]


class _Recall:
    """One recall on the CPU, in place."""

    def __init__(self, call: _Call, paging: Paging, pool: TensorPool | FilePool) -> None:
        self.call, self.paging, self.pool = call, paging, pool
        self.counts = call.counts.numpy()
        self.first = paging.first_pages(call.starts, len(call.summary), call.summary.device)
        self.position = int(call.positions[-1])

    def ahead(self) -> int:
        """Start to fetch what the step's query wants for the next position; nothing is waited for."""
        call, position = self.call, self.position + 1
        call.previous.copy_(call.query[:, :, -1])
        self.counts[Count.NEXT] = position
        self.counts[Count.STEPS] += 1
        if position < call.summary.shape[2] * self.paging.page and call.tau <= 1:
            # `previous` is not written before this is waited for, the caller's query may be.
            self.pool.submit(lambda: self.fetch(call.previous, position, None))
        return 0

    def now(self) -> int:
        """Fetch what the step's query wants for heads that turned away."""
        call, query = self.call, self.call.query[:, :, -1]
        if self.counts[Count.NEXT] == self.position:
            heads = call.tables.shape[1]
            away = turned(query.unsqueeze(2), call.previous.unsqueeze(2), heads, call.tau)[..., 0].numpy()
        else:
            away = np.ones(call.tables.shape[:2], dtype=bool)
        self.counts[Count.HEADS] += away.size
        if not away.any():
            return 0
        started = time.perf_counter_ns()
        self.counts[Count.CORRECTED] += int(away.sum())
        self.fetch(query, self.position, away)
        return time.perf_counter_ns() - started

    def fetch(self, probe: Tensor, position: int, heads: np.ndarray | None) -> None:
        """Bring what the probe [B, Hq, D] wants at a position, for some heads [B, H] or all."""
        call, paging = self.call, self.paging
        current = position // paging.page
        _, inverse = split_tables(call.tables, paging.slots)
        wanted = self._best(probe, position)
        if heads is not None:
            wanted &= heads[..., None]
        self.counts[Count.CHOSEN] += int(wanted.sum())
        self.counts[Count.HIT] += int((wanted & (inverse >= 0)).sum())
        always = paging.always(position, self.first, wanted.shape[-1]).numpy()[:, None]
        # What the other heads have at hand stays.
        wanted |= always if heads is None else np.where(heads[..., None], always, inverse >= 0)
        plan = place(call.tables, paging.slots, wanted)
        moved = plan.of(plan.page < current)
        self.pool.load(call.fast, moved)
        settle(call.tables, paging.slots, plan)
        self.counts[Count.MOVED] += len(moved.page)
        self.counts[Count.BYTES] += len(moved.page) * call.fast[0, 0, :, :, 0].numel() * call.fast.element_size()

    def _best(self, probe: Tensor, position: int) -> np.ndarray:
        """The chosen candidates, bool [B, H, P]."""
        call, paging = self.call, self.paging
        chosen = np.zeros((*call.tables.shape[:2], call.summary.shape[2]), dtype=bool)
        end = max(position // paging.page - paging.window + 1, 0)  # candidates are before it
        if end == 0:
            return chosen
        allowed = paging.candidates(position, self.first, end)
        if int(allowed.sum(-1).max()) <= paging.chosen:
            chosen[..., :end] = allowed.numpy()[:, None]
            return chosen
        summary = call.summary[:, :, :end]
        scores = page_scores(summary, probe.unsqueeze(2), allowed[:, None, None], call.pooling, call.scaled)
        chosen[..., :end] = best_pages(scores[:, :, 0], paging.chosen).numpy()
        return chosen


def _wrong(arguments: Mapping[str, Any]) -> str | None:
    fast = arguments["fast"]
    return Paging(fast.shape[3], fast.shape[1], arguments["sinks"], arguments["window"]).refuse()


_require = CONTRACT.requirement(_wrong)

torch.library.define(
    "graphwright::page_recall_",
    "(Tensor(a!) fast, Tensor(b!) tables, Tensor(c!) previous, Tensor(d!) counts, Tensor slow, Tensor summary,"
    " Tensor query, Tensor positions, Tensor? starts, int sinks, int window, float tau, str pooling, bool scaled,"
    " bool ahead) -> (Tensor(a!), Tensor(b!), Tensor(c!), Tensor(d!))",
)
torch.library.impl("graphwright::page_recall_", "cpu", _cpu_in_place)
torch.library.impl("graphwright::page_recall", "cpu", _cpu)
register(torch.ops.graphwright.page_recall.default, reference, CONTRACT)
