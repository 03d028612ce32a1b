"""How everything here is timed: one thread, A and B in turn in one process, the least of all rounds, ratios.

Absolute times on a shared machine swing by factors; minima of interleaved rounds and their ratio do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Row = tuple[str, str, str, bool]
"""A line of a table: what, measured, wanted, whether it holds."""


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1) -> dict[str, float]:
    """Time each candidate once a round, in turn.

    Args:
        candidates: What to time, by name.
        rounds: How many rounds.
        warmup: Unmeasured calls of each before.

    Returns:
        Least seconds by name.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


@contextmanager
def one_thread() -> Iterator[None]:
    """Measure on one thread: with a core stolen by a neighbour, two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
