"""A program with sparse linears against the dense one: quality, also behind a prompt alone, bytes, and time."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.examples.compare_linears import Logits
from graphwright.examples.continuation import continuation_perplexity
from graphwright.examples.perplexity import perplexity
from graphwright.inspection.tables import Table


def compare_sparse(
    program: gw.Program, canonical: gw.Program, windows: Tensor, logits_of: Logits, seconds: float
) -> RenderableType:
    """A table of both programs.

    Args:
        program: Made by AmberPruner, OutstandingSparse or LoSA.
        canonical: Of the same capture.
        windows: Tokens [n, S] of text that calibration did not see.
        logits_of: Program -> its logits of tokens.
        seconds: What `optimize` took.
    """
    table = Table("what", "dense", "sparse", "")
    programs = canonical, program
    before, after = (perplexity(logits_of(each), windows) for each in programs)
    table.add_row("perplexity, whole windows", f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}")
    before, after = (continuation_perplexity(each, windows) for each in programs)
    table.add_row("perplexity behind a prompt", f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}")
    for name, share in _shares(program).items():
        table.add_row(name, "", f"{share:.1%}", "")
    before, after = (each.weight_bytes() / 1e6 for each in programs)
    table.add_row("weights", f"{before:.1f} MB", f"{after:.1f} MB", f"{after / before:.3f}")
    count = windows.shape[1]
    calls = {
        f"prefill of {count} tokens": (windows[:1], torch.arange(count)),
        "a token after them": (windows[:1, :1], torch.tensor([count])),
    }
    with one_thread():
        for name, inputs in calls.items():
            runs = {str(place): (lambda e=each, i=inputs: e(*i)) for place, each in enumerate(programs)}
            before, after = interleaved(runs).values()
            table.add_row(name, f"{before * 1e3:.1f} ms", f"{after * 1e3:.1f} ms", f"{before / after:.2f}x")
    table.add_row("optimize(), calibration in it", "", f"{seconds:.0f} s", "")
    return table


def _shares(program: gw.Program) -> dict[str, float]:
    """What of the linears is sparse, by what the method says of it."""
    names = {"coverage": "arithmetic of prefill's linears", "zeros": "zeros among the weights"}
    records: list[dict[str, Any]] = list(program.profile.measured.values())
    return {said: record[key] for key, said in names.items() for record in records if key in record}
