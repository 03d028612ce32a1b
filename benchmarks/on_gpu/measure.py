"""One case on a GPU: is the kernel right, how long does it take, how long do the others, and how fast could it be?

    Case("int8_linear", "4096 -> 4096, 16 tokens", {"int8_linear": run, "bf16": other}, goals=(Goal("bf16", 1.5),), ...)

Times are medians of replayed CUDA graphs that call a candidate once for each input set, candidates in turn; input sets
are rotated so that together they do not fit the L2 cache. What cannot be captured is timed with events around calls.
The floor of a case is the larger of its fewest bytes over the bandwidth of a copy, and its operations over the rate of
a large matrix product, both measured in the same run.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[int], Any]
"""A candidate: called with the number of an input set."""
ROUNDS = 15
SECONDS = 0.3
"""Of device time that a candidate's rounds may take."""
CACHE = 128 << 20
"""Bytes that the input sets of a case exceed: more than twice the L2 cache of an H100."""


@dataclass(frozen=True)
class Goal:
    """At least how many times faster than ``over`` a kernel shall be: a candidate, the fastest of those whose name
    begins so, or the "floor".
    """

    over: str
    at_least: float


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        kernel: Its name, as the tables have it.
        at: The sizes.
        candidates: By name; the first is the kernel.
        check: The kernel's result on input set 0 -> its relative error; None where it was checked elsewhere.
        tolerance: Largest error.
        moved: Fewest bytes: each input read once, each result written once.
        operations: Multiplications and additions.
        rate: Which of the measured `Ceilings` the operations run at.
        goals: What shall be reached.
        sets: How many input sets there are.
        note: What else is to be said about it.
    """

    kernel: str
    at: str
    candidates: Mapping[str, Run]
    check: Callable[[Any], float] | None = None
    tolerance: float = 1e-2
    moved: int = 0
    operations: int = 0
    rate: str = "bf16"
    goals: Sequence[Goal] = ()
    sets: int = 1
    note: str = ""


@dataclass
class Ceilings:
    """What this device reaches: bytes a second of a copy, operations a second of matrix products, by name."""

    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)

    def floor(self, case: Case) -> float:
        """Seconds below which a case cannot run."""
        return max(case.moved / self.bandwidth, case.operations / self.rates[case.rate])


def sets_for(bytes_of_one: int, most: int = 16) -> int:
    """How many input sets of so many bytes exceed the cache."""
    return max(1, min(most, -(-CACHE // max(bytes_of_one, 1))))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|`` in float64; NaN where anything is NaN."""
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return float(difference)


def ceilings() -> Ceilings:
    """Measure them: a copy of 4 GiB, products of 8192 x 8192."""
    found = Ceilings(_bandwidth())
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    whole_a, whole_b = torch.randint(-127, 128, (2, 8192, 8192), device="cuda", dtype=torch.int8)
    products = {"bf16": lambda _: a @ b.T, "int8": lambda _: torch.ops.aten._int_mm(whole_a, whole_b.T)}
    for name, seconds in timed(products, 1).items():
        found.rates[name] = 2 * 8192**3 / seconds
    return found


def _bandwidth() -> float:
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / timed({"copy": lambda _: target.copy_(source)}, 1)["copy"]


def measure(case: Case, limits: Ceilings) -> dict[str, Any]:
    """Check and time a case; everything that the tables and the JSON file hold."""
    ours = next(iter(case.candidates))
    row: dict[str, Any] = {"kernel": case.kernel, "at": case.at, "note": case.note}
    if case.check is not None:
        row["error"] = case.check(poisoned(lambda: case.candidates[ours](0)))
        row["right"] = row["error"] <= case.tolerance
    row["failed"] = {}
    seconds = timed(case.candidates, case.sets, row["failed"])
    floor = limits.floor(case)
    row["seconds"] = seconds
    row["floor"] = floor
    row["goals"] = []
    for goal in case.goals:
        others = [
            time for name, time in {**seconds, "floor": floor}.items() if name.startswith(goal.over) and name != ours
        ]
        if others and ours in seconds:
            reached = min(others) / seconds[ours]
            row["goals"].append(
                {"over": goal.over, "wanted": goal.at_least, "reached": reached, "holds": reached >= goal.at_least}
            )
    gc.collect()
    torch.cuda.empty_cache()
    return row


def poisoned(run: Callable[[], Any]) -> Any:
    """The result of a call whose memory held NaN before, so that what was never written shows."""
    for tensor in _tensors(run()):
        filler = torch.empty_like(tensor)
        if filler.is_floating_point():
            filler.fill_(float("nan"))
        del filler
    return run()


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, tuple | list) else []


def timed(candidates: Mapping[str, Run], sets: int, failed: dict[str, str] | None = None) -> dict[str, float]:
    """Median seconds of a call by name, in turn; a candidate that fails is named in ``failed``, if that is given."""
    replays: dict[str, Callable[[], Any]] = {}
    for name, run in candidates.items():
        try:
            replays[name] = _captured(run, sets)
        except Exception as error:
            if failed is None:
                raise
            torch.cuda.synchronize()
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for number in range(ROUNDS):
        for name, replay in replays.items():
            if number >= 3 and sum(samples[name]) > SECONDS:
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) / 1000)
    return {name: statistics.median(times) / sets for name, times in samples.items()}


def _captured(run: Run, sets: int) -> Callable[[], Any]:
    """All input sets once, as a CUDA graph where that can be."""

    def every() -> None:
        for number in range(sets):
            run(number)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0)
        every()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            every()
    except RuntimeError:
        torch.cuda.synchronize()
        return every
    graph.replay()
    return graph.replay
