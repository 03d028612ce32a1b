"""The part of a report that is about video attention: what is kept by layer and head, what is reused, the videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from ..passes.decision import Decision
from .tables import Table

if TYPE_CHECKING:
    from ..program import Program

_MOST_ROWS = 48
_MOST_HEADS = 6
"""Heads that get a column each; of more, the table shows the mean and the extremes."""


def attention_parts(program: Program) -> list[RenderableType]:
    """What to print, nothing where no attention was made sparse or reuses scores."""
    kept = [d for d in program.decisions if d.status == "kept" and "recall" in d.figures]
    parts: list[RenderableType] = [_table(kept)] if kept else []
    reusing = [d for d in program.decisions if d.status == "kept" and "saving" in d.figures]
    parts += [_reuse_by_layer(reusing)] if reusing else []
    reuse = program.history.measured.get("reuse")
    parts += [_reuse_by_step(reuse)] if reuse else []
    videos = program.history.measured.get("video") or []
    for number, video in enumerate(videos):
        similar = f", SSIM {video['ssim']:.4f}" if "ssim" in video else ""
        parts.append(f"  sampled video {number + 1} against the dense program's: PSNR {video['psnr']:.2f} dB{similar}")
    orders = [record for record in program.history.passes if record.name == "hoist_order"]
    parts += [f"  {record.phase}: {refusal}" for record in orders for refusal in record.refusals]
    return parts


def _table(decisions: Sequence[Decision]) -> Table:
    heads = max(len(d.figures["recall"]) for d in decisions)
    table = Table(title="sparse attention: density/recall of each head", title_justify="left")
    table.add_column("phase")
    table.add_column("attention", overflow="fold", min_width=20)
    columns = [f"head {head}" for head in range(heads)] if heads <= _MOST_HEADS else ["mean", "least", "most"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    typed = any("type" in d.figures or "shape" in d.figures for d in decisions)
    if typed:
        table.add_column("types")
    for decision in decisions[:_MOST_ROWS]:
        cells = [decision.phase, decision.place.rsplit("/", 1)[0], *_cells(decision.figures, heads)]
        table.add_row(*cells, *([_types(decision.figures)] if typed else []))
    if len(decisions) > _MOST_ROWS:
        table.add_row("", f"{len(decisions) - _MOST_ROWS} more: report.to_json() has all")
    return table


def _reuse_by_layer(decisions: Sequence[Decision]) -> Table:
    names = list(dict.fromkeys(name for d in decisions for name in d.figures["saving_by_group"]))
    table = Table(title="scores reused: share of their arithmetic that is saved, on calibration", title_justify="left")
    table.add_column("phase")
    table.add_column("attention", overflow="fold", min_width=20)
    for column in ("all", *(f"{name} channels" for name in names), "queries reused", "keys reused"):
        table.add_column(column, justify="right", no_wrap=True)
    for decision in decisions[:_MOST_ROWS]:
        figures = decision.figures
        values = [sum(figures["saving"]) / len(figures["saving"])]
        values += [figures["saving_by_group"].get(name, 0.0) for name in names]
        values += [figures["reused_queries"], figures["reused_keys"]]
        table.add_row(decision.phase, decision.place.rsplit("/", 1)[0], *(f"{value:.3f}" for value in values))
    if len(decisions) > _MOST_ROWS:
        table.add_row("", f"{len(decisions) - _MOST_ROWS} more: report.to_json() has all")
    return table


def _reuse_by_step(reuse: dict[str, Any]) -> Table:
    names = list(dict.fromkeys(name for step in reuse["steps"] for name in step["groups"]))
    title = f"scores reused over the sampled videos: {reuse['saving']:.1%} of their arithmetic saved"
    table = Table(title=title, title_justify="left")
    for column in ("timestep", "all", *(f"{name} channels" for name in names), "least layer", "most"):
        table.add_column(column, justify="right")
    for step in reuse["steps"]:
        layers = step["layers"].values()
        values = [step["saving"], *(step["groups"].get(name, 0.0) for name in names), min(layers), max(layers)]
        table.add_row(f"{step['timestep']:.4g}", *(f"{value:.3f}" for value in values))
    return table


def _cells(figures: dict[str, Any], heads: int) -> list[str]:
    density, recall = figures["density"], figures["recall"]
    if heads <= _MOST_HEADS:
        return [f"{d:.2f}/{r:.3f}" for d, r in zip(density, recall, strict=True)]
    pairs = [(sum(density) / len(density), sum(recall) / len(recall))]
    pairs += [(min(density), min(recall)), (max(density), max(recall))]
    return [f"{d:.2f}/{r:.3f}" for d, r in pairs]


def _types(figures: dict[str, Any]) -> str:
    # Shapes say behind a comma whether they vary in time; `explain` shows that, a table has no room for it.
    counted = Counter(name.partition(",")[0] for name in figures.get("type") or figures.get("shape") or ())
    return ", ".join(f"{count} {name}" for name, count in counted.most_common())
