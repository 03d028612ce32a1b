"""The part of a report that is about sparse attention: density and recall by layer and head, and the sampled videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from .passes.decision import Decision
from .tables import Table

if TYPE_CHECKING:
    from .program import Program

_MOST_ROWS = 48
_MOST_HEADS = 6
"""Heads that get a column each; of more, the table shows the mean and the extremes."""


def attention_parts(program: Program) -> list[RenderableType]:
    """What to print, nothing where no attention was made sparse."""
    kept = [d for d in program.decisions if d.status == "kept" and "recall" in d.figures]
    parts: list[RenderableType] = [_table(kept)] if kept else []
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
