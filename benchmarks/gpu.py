"""All Triton kernels on a GPU, against what users would pick instead: `python -m graphwright.benchmarks.gpu`.

Each case is checked on fresh random inputs against float64, then timed with CUDA graphs; tables come last, and
everything that was measured goes into a JSON file. A target that is missed is marked, and the script goes on.

    --only int8 --only packed    some families (see FAMILIES)
    --output gpu.json            where the JSON file goes
    --warm                       compile everything, time nothing: run families side by side before a timed run
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graphwright.benchmarks.on_gpu import attention, caches, linears
from graphwright.benchmarks.on_gpu.measure import Case, ceilings, measure
from graphwright.inspection.tables import Table

FAMILIES: Mapping[str, Callable[[], Iterator[Case]]] = {
    "block_sparse": attention.block_sparse,
    "recognition": attention.recognition,
    "reuse": attention.reuse,
    "int8": linears.int8,
    "int4": linears.int4,
    "fused": linears.fused,
    "two_of_four": linears.two_of_four,
    "packed": caches.packed,
    "split": caches.split,
}


def main(arguments: Iterable[str] | None = None) -> int:
    """Measure and print; 1 if a kernel was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(FAMILIES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--warm", action="store_true")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    names = chosen.only or list(FAMILIES)
    if chosen.warm:
        return _warm(names)
    torch.manual_seed(0)
    limits = ceilings()
    found: dict[str, Any] = {
        "device": _device(),
        "bytes a second": limits.bandwidth,
        "operations a second": limits.rates,
    }
    console = Console(width=160)
    console.print(found)
    found["rows"] = []
    for name in names:
        for row in _measured(name, lambda case: measure(case, limits)):
            found["rows"].append({"family": name, **row})
            if chosen.output is not None:
                chosen.output.write_text(json.dumps(found, indent=1))
    console.print(table_of(found["rows"]))
    return int(any(not row.get("right", True) or row.get("failed") for row in found["rows"]))


def table_of(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The rows as a table: microseconds of each candidate, of the floor, and the goals."""
    table = Table("kernel", "at", "error", "microseconds", "floor", "reached / wanted")
    for row in rows:
        error = f"{row['error']:.1e}{'' if row['right'] else ' WRONG'}" if "error" in row else "-"
        times = ", ".join(f"{name} {1e6 * time:.1f}" for name, time in row.get("seconds", {}).items())
        failed = "".join(f"; {name} FAILED: {why}" for name, why in row.get("failed", {}).items())
        goals = ", ".join(
            f"{goal['over']} {goal['reached']:.2f} / {goal['wanted']:.2f}{'' if goal['holds'] else ' NO'}"
            for goal in row.get("goals", [])
        )
        table.add_row(row["kernel"], row["at"], error, times + failed, f"{1e6 * row.get('floor', 0):.1f}", goals)
    return table


def _measured(name: str, run: Callable[[Case], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A family's cases; one that breaks is a row that says so, and ends its family."""
    try:
        for case in FAMILIES[name]():
            yield run(case)
    except Exception as error:
        traceback.print_exc()
        yield {"kernel": name, "at": "-", "failed": {name: f"{type(error).__name__}: {error}"[:300]}}


def _warm(names: Iterable[str]) -> int:
    """Every candidate once, for the kernels that it compiles."""

    def once(case: Case) -> dict[str, Any]:
        for candidate in case.candidates.values():
            try:
                candidate(0)
            except Exception as error:
                print(case.kernel, error, file=sys.stderr)
        return {}

    for name in names:
        list(_measured(name, once))
    torch.cuda.synchronize()
    return 0


def _device() -> dict[str, str]:
    packages = {}
    for package in ("torch", "triton", "torchao"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "name": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "CUDA": str(torch.version.cuda),
        "driver": _driver(),
        "date": date.today().isoformat(),
        **packages,
    }


def _driver() -> str:
    try:
        import pynvml
    except ImportError:
        return "unknown (pip install nvidia-ml-py)"
    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


if __name__ == "__main__":
    raise SystemExit(main())
