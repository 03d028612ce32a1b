"""The table of reuse in the small Wan model: what is measured, and what is wanted of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from graphwright.benchmarks import reuse
from graphwright.benchmarks.timing import Row, one_thread
from graphwright.benchmarks.video import Setting

SAVINGS = {0.4: 0.2, 0.6: 0.2, 0.75: 0.1, 0.85: 1 / 30}
"""Saving over the whole sampling -> share of the steps that run dense first. With 20% of them dense, and the last one,
at most 75% can be saved, with every cell of 2x2x2 tokens constant."""


def reuse_table(quick: bool, output: Path, console: Console) -> tuple[list[Row], dict[str, Any]]:
    """Measure it; hours, most of them for the search, which goes on from its study when it is started again.

    Args:
        quick: Smaller videos and a search of 24 evaluations.
        output: Folder that keeps the study.
        console: Where to say what is being measured.
    """
    steps = 10 if quick else 30
    small, middle = Setting(4, 32, steps, ("bikes",)), Setting(4, 32, steps) if quick else Setting(8, 64, steps)
    large = middle if quick else Setting(16, 64, steps)
    size = {"parents": 8, "children": 4, "generations": 4} if quick else {}
    measured: dict[str, Any] = {"tokens": middle.tokens, "tokens timed": large.tokens, "steps": steps}
    with one_thread(), console.status("TimeRipple by saving") as status:
        savings = {0.4: 0.2} if quick else SAVINGS
        measured["savings"] = reuse.saving_curve(middle, savings)
        status.update("TimeRipple's ablations")
        short = small if quick else Setting(4, 64, steps)
        measured["ablations"] = reuse.ablations(short, 0.5) | reuse.forced(short)
        status.update("collapsed attention")
        measured["collapse"] = reuse.collapse(1024 if quick else 8192, (0.25, 0.5, 0.75, 0.875))
        status.update("ASTRAEA's search")
        measured["search"] = reuse.searched(small, output / "astraea-search.log", **size)
        table = measured["search"]["table"]
        status.update("ASTRAEA's budgets")
        measured["budgets"] = reuse.budgets(middle, table)
        measured["sampling"] = reuse.sampling_time(large, table, rounds=1)
        status.update("ASTRAEA's search against chance")
        shorter = Setting(2, 32, 6 if quick else 15, ("bikes",))
        trials = {"parents": 6, "children": 4, "generations": 2} if quick else _SHORT
        measured["chance"] = reuse.against_random(shorter, (0, 1, 2), 0.5, **trials)
    return _rows(measured), measured


_SHORT = {"parents": 20, "children": 15, "generations": 8}
"""140 evaluations a seed."""


def _rows(measured: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, found in measured["savings"].items():
        reused, mask = found["reuse"], found["mask"]
        text = f"{reused['saving']:.1%} saved, {_quality(reused)}; small values masked {mask['psnr']:.1f} dB"
        holds = reused["psnr"] >= mask["psnr"] + 3 and (name != "60%" or reused["psnr"] >= 30)
        wanted = "masking + 3 dB" + (", 30 dB" if name == "60%" else "")
        rows.append((f"TimeRipple by element, {name} of all score arithmetic", text, wanted, holds))
    for name, found in measured["ablations"].items():
        rows.append((f"TimeRipple, {name}", f"{found['saving']:.1%} saved, {_quality(found)}", "-", True))
    for found in measured["collapse"]:
        text = f"{found['time']:.3f} of dense, {found['of ideal']:.2f} of (1 - rq)(1 - rk)"
        rows.append(
            (f"collapsed_attention, {found['left']:.1%} of the map left", text, "1.5", found["of ideal"] <= 1.5)
        )
    budgets = measured["budgets"]
    best = budgets["searched"]["psnr"]
    for name, found in budgets.items():
        compared = name in ("uniform", "steps skipped", "fixed tokens", "queries and keys")
        rows.append((
            f"ASTRAEA, {name}", _quality(found), "searched - 1 dB" if compared else "-", best >= found["psnr"] + 1
        ))  # fmt: skip
    sampling = measured["sampling"]
    text = f"{sampling['speedup']:.2f}x of dense, {sampling['state bytes'] / 2**20:.1f} MiB of state"
    rows.append(
        (f"ASTRAEA, whole sampling, {measured['tokens timed']} tokens", text, "1.5x", sampling["speedup"] >= 1.5)
    )
    search = measured["search"]
    text = f"{search['evaluations']} evaluations, {search['seconds'] / 60:.1f} min in this run"
    holds = search["evaluations"] <= 950 and search["seconds"] <= 1800
    rows.append(("ASTRAEA's search", text, "950, 30 min", holds))
    for found in measured["chance"]:
        text = f"error {found['search']:.2e}, random {found['random']:.2e}, uniform {found['uniform']:.2e}"
        rows.append(
            (
                f"search of {found['evaluations']}, seed {found['seed']}",
                text,
                "random's",
                found["search"] <= found["random"],
            )
        )
    return rows


def _quality(found: dict[str, Any]) -> str:
    return f"PSNR {found['psnr']:.1f} dB, SSIM {found['ssim']:.3f}"
