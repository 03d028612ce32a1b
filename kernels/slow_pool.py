"""Where the pages of a cache lie that are not at hand: a slow pool, behind a tensor [B, P, H, 2, page, D].

    a tensor in memory      as it is; what functional runs of a graph use, and page-locked memory beside a GPU
    a file                  `SlowFile`: a mapped temporary file, for one program's layers together

A fragment (one page of one head) is contiguous: keys, then values, [2, page, D], so one read brings it.

A `SlowFile` has no name: it is unlinked as soon as it is open, so the system takes it back whatever ends the process.
Its room is reserved on the disk before tokens are written (`reserve`), so a full disk is an error before anything has
changed, never a signal in the middle of a write through the mapping. Pages are read and written by calls that report
errors, not through the mapping. A file belongs to the process that opened it: after a fork the child is refused.

`pool_of(slow)` finds the pool of a tensor, by where its memory begins.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgument, OffloadError
from .contract import Spec
from .page_tables import Plan

AHEAD = 16
"""Pages that are reserved at a time: a call to the file system for each 512 tokens, at pages of 32."""


class TensorPool:
    """A slow pool that is a tensor [B, P, H, 2, page, D] in memory."""

    def __init__(self, slow: Tensor) -> None:
        self.slow = slow

    def reserve(self, pages: int) -> None:
        """Nothing to do: the memory is there."""

    def write(self, page: int, content: Tensor) -> None:
        """Store pages from `page` on: content [B, H, n, 2, page, D]."""
        self.slow[:, page : page + content.shape[2]] = content.transpose(1, 2)

    def load(self, fast: Tensor, plan: Plan) -> None:
        """Copy fragments into their slots of the fast pool [B, S, 2, page, H, D]."""
        batch, head, slot, page = plan.indices()
        fast[batch, slot, :, :, head] = self.slow[batch, page, head]

    def read(self, pages: int) -> Tensor:
        """The first pages of all sequences: [B, pages, H, 2, page, D]."""
        return self.slow[:, :pages]

    def submit(self, work: Callable[[], None]) -> None:
        """Do it now: there is nothing to wait for."""
        work()

    def wait(self) -> int:
        """Nanoseconds that were waited."""
        return 0


def open_pools(
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    folder: str | Path | None = None,
    buffers: int = 1,
) -> list[FilePool]:
    """The slow pools of one program's layers, in one file; the file goes when they do.

    Args:
        shapes: [B, P, H, 2, page, D] of each layer's pool; P is the same in all.
        dtypes: Of each layer.
        folder: Where the file lies; the system's folder for temporary files by default.
        buffers: Staging buffers of a recall: with 2, one is filled from the file while the other is scattered, in a
            thread of its own. That pays where a copy in memory takes longer than to hand it over.

    Raises:
        OffloadError: The file cannot be made.
    """
    sizes = [prod(shape) // int(shape[1]) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    file = SlowFile(sum(sizes), int(shapes[0][1]), folder, buffers)
    pools: list[FilePool] = []
    offset = 0
    for shape, dtype, size in zip(shapes, dtypes, sizes, strict=True):
        batch, pages, heads, _, page, dim = map(int, shape)
        fragment = 2 * page * dim
        strides = (heads * fragment, file.record // dtype.itemsize, fragment, page * dim, dim, 1)
        slow = file.mapped.view(dtype).as_strided(
            (batch, pages, heads, 2, page, dim), strides, offset // dtype.itemsize
        )
        pools.append(FilePool(file, slow, offset))
        offset += size
    return pools


class SlowFile:
    """A temporary file of so many records: a page of all layers each, one layer after the other.

    Args:
        record: Bytes of a page of all layers.
        pages: How many there are.
        folder, buffers: As in `open_pools`.

    Raises:
        OffloadError: The file cannot be made.
    """

    def __init__(self, record: int, pages: int, folder: str | Path | None = None, buffers: int = 1) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        self.record = record
        self.pages = pages
        self.buffers = buffers
        self._process = os.getpid()
        self._reserved = 0
        total = max(record * pages, 1)
        try:
            with tempfile.TemporaryFile(dir=self.folder, prefix="graphwright-", suffix=".pages") as file:
                os.ftruncate(file.fileno(), total)
                mapped = mmap.mmap(file.fileno(), total)
                self.handle = os.dup(file.fileno())
        except OSError as error:
            raise OffloadError(f"no slow pool of {total} bytes in {self.folder}: {error.strerror or error}") from error
        weakref.finalize(self, os.close, self.handle)
        self.mapped = torch.frombuffer(mapped, dtype=torch.uint8)
        self.staging = _Staging()
        self.reader = ThreadPoolExecutor(1, "graphwright-recall")
        self.scatterer = ThreadPoolExecutor(1, "graphwright-scatter")

    @property
    def reserved_bytes(self) -> int:
        """What it takes on the disk so far."""
        return self._reserved * self.record

    def check_process(self) -> None:
        """Refuse a child of the process that opened the file.

        Raises:
            InvalidArgument: The file is another process's.
        """
        if os.getpid() != self._process:
            raise InvalidArgument(
                f"this program's slow pool belongs to process {self._process}, and this is its fork {os.getpid()}:"
                " call reset(), which makes a new one, or load the program here"
            )

    def reserve(self, pages: int) -> None:
        """Make sure that the disk has room for so many pages of every layer.

        Raises:
            OffloadError: It has not; nothing has changed.
            InvalidArgument: More pages than the pool has.
        """
        if pages <= self._reserved:
            return
        if pages > self.pages:
            raise InvalidArgument(f"the slow pool holds {self.pages} pages, got page {pages - 1}")
        self.check_process()
        pages = min(-(-pages // AHEAD) * AHEAD, self.pages)
        try:
            os.posix_fallocate(self.handle, 0, pages * self.record)
        except OSError as error:
            raise OffloadError(
                f"no room for {pages * self.record} bytes of the cache in {self.folder}: {error.strerror}. What was"
                " generated so far is kept: make room and go on, or choose another folder with Program.offload_to"
            ) from error
        self._reserved = pages

    def read(self, view: memoryview, offset: int) -> None:
        """Fill bytes of memory from the file."""
        done = 0
        while done < len(view):
            count = self.call(os.preadv, [view[done:]], offset + done)
            if count == 0:
                raise OffloadError(f"the slow pool in {self.folder} ends at byte {offset + done}")
            done += count

    def write(self, view: memoryview, offset: int) -> None:
        """Write bytes of memory to the file."""
        done = 0
        while done < len(view):
            done += self.call(os.pwritev, [view[done:]], offset + done)

    def call(self, function: Callable[..., int], buffers: list[memoryview], offset: int) -> int:
        """Read or write; what fails is an `OffloadError`."""
        try:
            return function(self.handle, buffers, offset)
        except OSError as error:
            raise OffloadError(f"the slow pool in {self.folder} fails: {error.strerror}") from error


class FilePool:
    """One layer's part of a `SlowFile`."""

    def __init__(self, file: SlowFile, slow: Tensor, offset: int) -> None:
        self.file = file
        self.slow = slow
        self.offset = offset
        self._pending: Future[None] | None = None
        _, _, heads, _, page, dim = slow.shape
        self.fragment = 2 * page * dim * slow.element_size()
        self._sequence = heads * self.fragment
        _POOLS[slow.data_ptr()] = self

    def reserve(self, pages: int) -> None:
        """See `SlowFile.reserve`."""
        self.file.reserve(pages)

    def write(self, page: int, content: Tensor) -> None:
        """Store pages from `page` on: content [B, H, n, 2, page, D]."""
        rows = content.permute(2, 0, 1, 3, 4, 5).contiguous()  # [n, B, H, 2, page, D], as in the file
        for number, row in enumerate(rows, page):
            self.file.write(bytes_of(row), self.offset + number * self.file.record)

    def load(self, fast: Tensor, plan: Plan) -> None:
        """Copy fragments into their slots of the fast pool [B, S, 2, page, H, D].

        With two buffers one head's fragments are scattered while the next one's are read.
        """
        if len(plan.page) == 0:
            return
        if self.file.buffers == 1:
            _scatter(fast, self._fill(plan, 0), plan)
            return
        scattered: list[Future[None]] = []
        try:
            for number, part in enumerate(_by_head(plan)):
                if number >= 2:
                    scattered[number - 2].result()  # its buffer is free again
                staged = self._fill(part, number % 2)
                scattered.append(self.file.scatterer.submit(_scatter, fast, staged, part))
        finally:
            wait_for(scattered)  # also where reading failed: the slots will be given to other pages
        for future in scattered:
            future.result()

    def _fill(self, plan: Plan, buffer: int) -> Tensor:
        """Fragments [n, 2, page, D], in a staging buffer."""
        _, _, _, _, page, dim = self.slow.shape
        size, count = self.fragment, len(plan.page)
        staged = self.file.staging.take(buffer, count * size)
        offsets = self.offset + plan.page * self.file.record + plan.batch * self._sequence + plan.head * size
        view = bytes_of(staged)
        for place, offset in enumerate(offsets.tolist()):
            self.file.read(view[place * size : (place + 1) * size], offset)
        return staged.view(self.slow.dtype).view(count, 2, page, dim)

    def read(self, pages: int) -> Tensor:
        """The first pages of all sequences: [B, pages, H, 2, page, D]."""
        batch, _, heads, _, page, dim = self.slow.shape
        result = torch.empty(pages, batch, heads, 2, page, dim, dtype=self.slow.dtype)
        for number, row in enumerate(result):
            self.file.read(bytes_of(row), self.offset + number * self.file.record)
        return result.transpose(0, 1)

    def submit(self, work: Callable[[], None]) -> None:
        """Do it in the background; `wait` says when it is done, and raises what it raised."""
        self.file.check_process()
        self._pending = self.file.reader.submit(work)

    def wait(self) -> int:
        """Wait for what was submitted; the nanoseconds that it took."""
        self.file.check_process()  # in a fork nobody is at work, so nothing would ever be done
        pending, self._pending = self._pending, None
        if pending is None:
            return 0
        started = time.perf_counter_ns()
        pending.result()
        return time.perf_counter_ns() - started

    def settle(self) -> None:
        """Wait for what was submitted, whatever became of it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            wait_for([pending])


def nowhere(like: Spec | Tensor, device: torch.device) -> Tensor:
    """What stands for a slow pool that is not placed yet: a tensor of its shape without memory of its own."""
    return torch.zeros((), dtype=like.dtype, device=device).expand(tuple(like.shape))


def pool_of(slow: Tensor) -> FilePool | TensorPool:
    """The pool behind a tensor: a file's where it is one, else the tensor itself."""
    found = _POOLS.get(slow.data_ptr())
    return TensorPool(slow) if found is None else found


_POOLS: weakref.WeakValueDictionary[int, FilePool] = weakref.WeakValueDictionary()


class _Staging(threading.local):
    """Memory that fragments are read to, kept for the next ones; each thread has its own."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def take(self, number: int, size: int) -> Tensor:
        """So many bytes of a buffer."""
        if number not in self.buffers or self.buffers[number].numel() < size:
            self.buffers[number] = torch.empty(size, dtype=torch.uint8)
        return self.buffers[number][:size]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(torch.uint8).reshape(-1).numpy().data


def _scatter(fast: Tensor, staged: Tensor, plan: Plan) -> None:
    batch, head, slot, _ = plan.indices()
    fast[batch, slot, :, :, head] = staged


def _by_head(plan: Plan) -> list[Plan]:
    """The plan in pieces of one sequence and head each; its rows are in that order."""
    changes = np.flatnonzero(np.diff(plan.batch) | np.diff(plan.head)) + 1
    edges = [0, *changes.tolist(), len(plan.page)]
    return [Plan(*(column[low:high] for column in plan)) for low, high in pairwise(edges)]
