"""A program with 4-bit linears against the canonical one: rotations, quality, bytes, time, and what its making took."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import RenderableType
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.examples.perplexity import perplexity
from graphwright.inspection.tables import Table
from graphwright.patterns.graph import GraphView
from graphwright.prepare import is_exact
from graphwright.profiles.activation_samples import sample_rows
from graphwright.profiles.whip import random_hadamard, rounding_error

Logits = Callable[[gw.Program], Callable[[Tensor], Tensor]]
ROWS = 64
"""Rows of activations of each norm, in the row of errors."""


def compare_linears(
    program: gw.Program,
    canonical: gw.Program,
    captured: gw.Captured,
    windows: Tensor,
    logits_of: Logits,
    seconds: float,
) -> RenderableType:
    """A table of both programs.

    Args:
        program: Made by DartQuant.
        canonical: Of the same capture.
        captured: The capture.
        windows: Tokens [n, S] of text that calibration did not see.
        logits_of: Program -> its logits of tokens.
        seconds: What `optimize` took.
    """
    table = Table("what", "canonical", "4 bits", "")
    table.add_row("logits, rotations alone", "", f"{_exactness(program, captured, windows):.1e}", "of the largest")
    for name, error in _stream_errors(program, canonical, windows).items():
        table.add_row(f"4-bit error, {name}", "", f"{error:.5f}", "activations")
    before, after = (perplexity(logits_of(each), windows) for each in (canonical, program))
    table.add_row("perplexity", f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}")
    before, after = _linear_bytes(program, canonical)
    table.add_row("linears in 4 bits", _megabytes(before), _megabytes(after), f"{after / max(before, 1):.3f} of fp32")
    before, after = canonical.weight_bytes(), program.weight_bytes()
    table.add_row("all weights", _megabytes(before), _megabytes(after), f"{after / before:.3f}")
    for name, (before, after) in _times(program, canonical, windows[:1]).items():
        table.add_row(name, f"{before * 1e3:.1f} ms", f"{after * 1e3:.1f} ms", f"{before / after:.2f}x")
    int8 = sum(d.status == "kept" and d.pass_name == "quantize_linear" for d in program.decisions)
    table.add_row("linears in int8 instead", "", str(int8))
    table.add_row("optimize(), calibration in it", "", f"{seconds:.0f} s")
    return table


def _exactness(program: gw.Program, captured: gw.Captured, windows: Tensor) -> float:
    """Of a program with the rotations and nothing else; float32."""
    exact = [decision for decision in program.decisions if is_exact(decision)]
    rotated = gw.optimize(captured, profile=program.profile.model_copy(update={"decisions": exact}), progress=False)
    canonical = gw.optimize(captured, progress=False)
    tokens = windows[:1, :64]
    wanted, found = (each(tokens, torch.arange(tokens.shape[1])) for each in (canonical, rotated))
    return float((found - wanted).abs().max() / wanted.abs().max())


def _stream_errors(program: gw.Program, canonical: gw.Program, windows: Tensor) -> dict[str, float]:
    """Relative squared error of rows rounded to 4 bits, as they are and rotated; empty where no stream was rotated."""
    sites = canonical.sites["prefill"].residual
    width = [site.width for site in sites]
    rotation = next((t for t in program.profile.tensors.values() if list(t.shape) == width * 2), None)
    if rotation is None:
        return {}
    generator = torch.Generator().manual_seed(0)
    inputs = [[windows[:1], torch.arange(windows.shape[1])]]
    found = sample_rows(canonical.phases["prefill"].exported, inputs, sites, [], ROWS, generator)
    rows = torch.cat(list(found.values()))
    hadamard = random_hadamard(rows.shape[-1], generator)
    made = {"not rotated": rows, "random Hadamard": rows @ hadamard, "DartQuant": rows @ rotation}
    return {name: rounding_error(each, 4, 0.9) for name, each in made.items()}


def _linear_bytes(program: gw.Program, canonical: gw.Program) -> tuple[int, int]:
    """Of the linears that have 4 bits in a prefill: in float32, and as they are stored, scales included."""
    kept = {d.site for d in program.decisions if d.status == "kept" and d.pass_name == "quantize_linear_int4"}
    linears = [site for site in canonical.sites["prefill"].linear if site.id in kept]
    view = GraphView(program.phases["prefill"].exported)
    calls = [node for node in view.graph.nodes if "int4" in str(node.target)]
    read = {view.target(node): view.tensor(node) for call in calls for node in call.all_input_nodes}
    after = sum(tensor.nbytes for tensor in read.values() if tensor is not None)
    return sum(site.in_features * site.out_features * 4 for site in linears), after


def _times(program: gw.Program, canonical: gw.Program, window: Tensor) -> dict[str, tuple[float, float]]:
    """Seconds of both, in turn, on one thread."""
    count = window.shape[1]
    calls = {
        f"prefill of {count} tokens": (window, torch.arange(count)),
        "a token after them": (window[:, :1], torch.tensor([count])),
    }
    times = {}
    with one_thread():
        for name, inputs in calls.items():
            runs = {"canonical": lambda i=inputs: canonical(*i), "4 bits": lambda i=inputs: program(*i)}
            best = interleaved(runs)
            times[name] = (best["canonical"], best["4 bits"])
    return times


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
