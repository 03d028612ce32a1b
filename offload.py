"""Where the pages of a program's cache lie that are not at hand, and what was moved: FreeKV's slow memory.

In a graph the slow pool of a layer is state like any other. Nothing of it is in memory: the tensor that stands for it
has no memory of its own until the program runs, and is a mapped file's then (`kernels/slow_pool.py`). So a program that
is made, saved or loaded costs no room, each program has a file of its own, and what is saved holds no pages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .kernels import page_append as _page_append  # noqa: F401 (registers the operator)
from .kernels.page_tables import Count
from .kernels.slow_pool import FilePool, nowhere, open_pools
from .patterns.graph import GraphView
from .phases import Phase


class Offload:
    """The slow pools of one program; without any it does nothing.

    Args:
        phases: The program's, which share their state.

    Attributes:
        names: Of the slow pools, in the order of layers.
        counts: Of the tensors that count what was moved.
    """

    def __init__(self, phases: Iterable[Phase]) -> None:
        self._phases = list(phases)
        calls = [call for phase in self._phases for call in _appends(phase.exported)]
        self.names: tuple[str, ...] = tuple(dict.fromkeys(slow for slow, _ in calls))
        self.counts: tuple[str, ...] = tuple(dict.fromkeys(counts for _, counts in calls))
        self._folder: Path | None = None
        self._buffers = 1
        self._pools: list[FilePool] = []
        self._process = os.getpid()
        self.drop()

    def place(self) -> None:
        """Open the file, where there is none yet, and let all phases see it.

        Raises:
            OffloadError: It cannot be made.
        """
        if self._pools or not self.names:
            return
        state = self._phases[0].exported.state_dict
        tensors = [state[name] for name in self.names]
        self._pools = open_pools([t.shape for t in tensors], [t.dtype for t in tensors], self._folder, self._buffers)
        self._process = os.getpid()
        self._let({name: pool.slow for name, pool in zip(self.names, self._pools, strict=True)})

    def drop(self, folder: str | Path | None = None, buffers: int | None = None) -> None:
        """Close the file; the next one lies in `folder`, and is read through so many buffers, if they are given."""
        self._folder = Path(folder) if folder is not None else self._folder
        self._buffers = buffers or self._buffers
        self.settle()
        self._pools = []
        state = self._phases[0].exported.state_dict
        self._let({name: nowhere(state[name], state[name].device) for name in self.names})

    def settle(self) -> None:
        """Wait for pages that are on their way; an error on that way is no one's any more."""
        for pool in self._pools if self.is_mine else ():
            pool.settle()

    @property
    def is_mine(self) -> bool:
        """Whether the file was opened by this process, and not by the one that it is a fork of."""
        return not self._pools or self._process == os.getpid()

    @property
    def bytes(self) -> int:
        """What the file takes on the disk so far."""
        return self._pools[0].file.reserved_bytes if self._pools else 0

    def _let(self, tensors: Mapping[str, Tensor]) -> None:
        for phase in self._phases:
            state = phase.exported.state_dict
            state.update({name: tensor for name, tensor in tensors.items() if name in state})


def figures(counts: Iterable[Tensor]) -> dict[str, float]:
    """What was counted since the last reset, all layers together; empty where there is no count.

    Args:
        counts: The counts of each layer, see `kernels/page_tables.py`.

    Returns:
        `steps` (tokens that were decoded or read), `heads` that were compared with their previous query, `corrected` of
        these, pages `chosen`, `hit` of these (they were at hand), pages `moved`, `bytes` of these, seconds `stalled`,
        and the shares `correction_rate` and `hit_rate`.
    """
    layers = list(counts)
    if not layers:
        return {}
    total = torch.stack(layers).sum(0).tolist()
    found = {count.name.lower(): float(total[count]) for count in Count if count not in (Count.NEXT, Count.WRITTEN)}
    found["steps"] /= len(layers)
    found["stalled"] /= 1e9
    found["correction_rate"] = found["corrected"] / max(found["heads"], 1)
    found["hit_rate"] = found["hit"] / max(found["chosen"], 1)
    return found


def _appends(program: ExportedProgram) -> list[tuple[str, str]]:
    """Slow pool and counts of each layer."""
    view = GraphView(program)
    calls = program.graph.find_nodes(op="call_function", target=torch.ops.graphwright.page_append.default)
    return [(str(view.target(call.args[1])), str(view.target(call.args[4]))) for call in calls]
