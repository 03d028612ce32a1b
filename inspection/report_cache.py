"""The part of a report that is about caches: bits by layer, heads that are split, pages that moved, true bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from ..passes.decision import Decision
from .tables import Table

if TYPE_CHECKING:
    from ..program import Program


def cache_parts(program: Program) -> list[RenderableType]:
    """What to print, nothing where no cache was packed, split or offloaded."""
    return [*_packed_parts(program), *_split_parts(program), *_offload_parts(program)]


def _packed_parts(program: Program) -> list[RenderableType]:
    layers = _layers(program, "quantize_cache")
    if not layers:
        return []
    parts: list[RenderableType] = ["packed cache: bits of keys and values by layer", _bits(layers), *_bytes(layers)]
    searched = program.profile.measured.get("kvtuner")
    if searched:
        about = f"{len(searched['trials'])} tables by mean bits and {searched['objective']}"
        parts += [f"search for the bits: Pareto front of {about}", _front(searched)]
    return parts


def _split_parts(program: Program) -> list[RenderableType]:
    layers = _layers(program, "split_cache_heads")
    if not layers:
        return []
    table = Table()
    for column in ("layers", "heads that keep every token", "of the others", "packed"):
        table.add_column(column)
    for first, last, row in _runs([_split_row(decision) for decision in layers]):
        table.add_row(_span(first, last), *row)
    kept = [d for d in layers if d.status == "kept"]
    whole, all_heads, before, after = (
        sum(column) for column in zip(*(_split_figures(decision) for decision in kept), strict=True)
    )
    size = f"{after / 1e6:.2f} MB, {after / before:.3f} of the whole cache"
    return ["split cache: heads by layer", table, f"  {whole} of {all_heads} heads keep every token: {size}"]


def _split_row(decision: Decision) -> tuple[str, str, str]:
    if decision.status != "kept":
        return "as it was", "-", "-"
    options, pack = decision.options, decision.options.get("pack")
    others = f"first {options['sinks']}, last {options['window']}{', mean' if options['compensate'] else ''}"
    packed = f"K{pack['key_bits']}V{pack['value_bits']}" if pack else "-"
    return ", ".join(map(str, options["keep"])) or "none", others, packed


def _split_figures(decision: Decision) -> tuple[int, int, int, int]:
    """Heads that keep every token, all heads, and the bytes of the whole and of the split cache."""
    whole, heads = len(decision.options["keep"]), int(decision.figures["heads"])
    before, after = (int(decision.facts[name]) for name in ("full bytes", "split bytes"))
    if decision.options.get("pack"):
        after += (int(decision.facts["packed bytes"]) - before) * whole // heads
    return whole, heads, before, after


def _offload_parts(program: Program) -> list[RenderableType]:
    layers = [d for d in _layers(program, "offload_cache") if d.status == "kept" and d.options["offload"]]
    if not layers:
        return []
    before, after = (sum(int(d.facts[name]) for d in layers) for name in ("full bytes", "bytes at hand"))
    options = layers[0].options
    budget = f"{options['budget']} tokens in pages of {options['page']}, first {options['sinks']}"
    parts: list[RenderableType] = [
        f"offloaded cache: {len(layers)} layers, at hand {budget}, last {options['window']}, tau {options['tau']}",
        f"  in memory {after / 1e6:.2f} MB, {after / before:.3f} of the whole cache; on disk"
        f" {program.offloaded_bytes() / 1e6:.2f} MB",
    ]
    found = program.offload_figures()
    if found["steps"]:
        table = Table("", "since the last reset", "a step")
        for name, form in _MOVES.items():
            value = found[name]
            table.add_row(name, form.format(value), "" if name in _SHARES else form.format(value / found["steps"]))
        parts.append(table)
    return parts


_SHARES = ("steps", "correction_rate", "hit_rate")
_MOVES = {
    "steps": "{:.0f}",
    "correction_rate": "{:.1%}",
    "chosen": "{:.1f}",
    "hit_rate": "{:.1%}",
    "moved": "{:.1f}",
    "bytes": "{:.0f}",
    "stalled": "{:.4f} s",
}
"""What is counted of an offloaded cache, and how it is printed."""


def _layers(program: Program, pass_name: str) -> list[Decision]:
    """What a pass was to do at each layer, in the first phase where it was kept somewhere."""
    found = [d for d in program.decisions if d.pass_name == pass_name]
    phase = next((d.phase for d in found if d.status == "kept"), None)
    return [d for d in found if d.phase == phase]


def _runs(rows: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Neighbouring rows that are equal, as (first, last, row)."""
    runs: list[tuple[int, int, Any]] = []
    for number, row in enumerate(rows):
        if runs and runs[-1][2] == row:
            runs[-1] = (runs[-1][0], number, row)
        else:
            runs.append((number, number, row))
    return runs


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _bits(layers: Sequence[Decision]) -> Table:
    """Runs of neighbouring layers with the same bits."""
    table = Table()
    for column in ("layers", "bits", "mode"):
        table.add_column(column)
    labels = [
        (d.facts.get("role", "-"), d.options.get("mode", "-")) if d.status == "kept" else ("as it was", "-")
        for d in layers
    ]
    for first, last, label in _runs(labels):
        table.add_row(_span(first, last), *label)
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
