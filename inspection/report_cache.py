"""The part of a report that is about packed caches: bits by layer, true bytes, and the front of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from ..passes.decision import Decision
from .tables import Table

if TYPE_CHECKING:
    from ..program import Program


def cache_parts(program: Program) -> list[RenderableType]:
    """What to print, nothing where no cache was packed."""
    kept = [d for d in program.decisions if d.status == "kept" and d.pass_name == "quantize_cache"]
    if not kept:
        return []
    phase = kept[0].phase
    layers = [d for d in program.decisions if d.phase == phase and d.pass_name == "quantize_cache"]
    parts: list[RenderableType] = ["packed cache: bits of keys and values by layer", _bits(layers), *_bytes(layers)]
    searched = program.profile.measured.get("kvtuner")
    if searched:
        about = f"{len(searched['trials'])} tables by mean bits and {searched['objective']}"
        parts += [f"search for the bits: Pareto front of {about}", _front(searched)]
    return parts


def _bits(layers: Sequence[Decision]) -> Table:
    """Runs of neighbouring layers with the same bits."""
    table = Table()
    for column in ("layers", "bits", "mode"):
        table.add_column(column)
    rows: list[list[Any]] = []
    for number, decision in enumerate(layers):
        kept = decision.status == "kept"
        label = (decision.facts.get("role", "-"), decision.options.get("mode", "-")) if kept else ("as it was", "-")
        if rows and rows[-1][2] == label:
            rows[-1][1] = number
        else:
            rows.append([number, number, label])
    for first, last, (bits, mode) in rows:
        table.add_row(str(first) if first == last else f"{first} to {last}", bits, mode)
    return table


def _bytes(layers: Sequence[Decision]) -> list[str]:
    kept = [d for d in layers if d.status == "kept" and "packed bytes" in d.facts]
    if not kept:
        return []
    before, after = (sum(int(d.facts[name]) for d in kept) for name in ("float16 bytes", "packed bytes"))
    bits = sum(d.options["key_bits"] + d.options["value_bits"] for d in kept) / (2 * len(kept))
    return [
        f"  {len(kept)} of {len(layers)} layers packed: {bits:.2f} mean bits, {8 * 2 * after / before:.2f} with scales,"
        f" minima and tails; {after / 1e6:.2f} MB, {after / before:.3f} of float16",
        "  A packed cache saves memory. On a CPU it does not save time: what reading less gains, unpacking costs.",
    ]


def _front(searched: Mapping[str, Any]) -> Table:
    groups = searched["groups"]
    table = Table()
    table.add_column("bits", justify="right")
    table.add_column(searched["objective"], justify="right")
    for group in groups:
        table.add_column(f"layers {_short(group['layers'])}", overflow="fold")
    table.add_column("")
    for point in searched["front"]:
        chosen = point["bits"] == searched["bits"] and point["value"] == searched["value"]
        table.add_row(f"{point['bits']:.2f}", f"{point['value']:.5g}", *point["groups"], "chosen" if chosen else "")
    return table


def _short(layers: Sequence[int]) -> str:
    """`0, 3-5`: runs of neighbours as one."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
