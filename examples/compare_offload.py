"""A program with an offloaded cache against the one with the full cache, on the end of a text that fills the cache."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import Tensor
from torch.nn import functional

import graphwright as gw
from graphwright.inspection.tables import Table

PIECE = 512
"""Tokens that are read at a time: their logits are in memory together."""
SCORED, WRITTEN = 64, 32
"""Tokens at the end of the text that are predicted, and tokens that are generated after them."""


def compare_offload(offloaded: gw.Program, full: gw.Program, tokenizer: Any, text: Tensor) -> RenderableType:
    """A table of both programs, and how the offloaded one goes on with the text.

    Both read the text in pieces and decode its last tokens one by one: their perplexity, and the time of each, are
    those of decoding. Then they write greedily.

    Args:
        offloaded: A program of `capture_causal_lm` with its cache offloaded.
        full: The same without.
        tokenizer: Of the model.
        text: Tokens [1, N]; text and what is written fit the cache.
    """
    table = Table("cache", "perplexity", "state in memory", "on disk", "ms a token", "stalled", "hits", "moved a token")
    written = {}
    for name, program in {"full": full, "offloaded": offloaded}.items():
        loss, seconds, written[name] = _decode(program, text)
        found = program.offload_figures()
        moves = ("", "", "")
        if found:
            a_token = 1 / (SCORED + WRITTEN)
            moves = (
                f"{found['stalled'] * a_token * 1e3:.1f} ms",
                f"{found['hit_rate']:.1%}",
                f"{found['bytes'] * a_token / 1e6:.2f} MB",
            )
        size, disk = program.state_bytes() / 1e6, program.offloaded_bytes() / 1e6
        table.add_row(name, f"{loss:.3f}", f"{size:.1f} MB", f"{disk:.1f} MB", f"{seconds * 1e3:.0f}", *moves)
    same = sum(a == b for a, b in zip(*written.values(), strict=True))
    table.caption = f"{same} of {WRITTEN} greedy tokens the same"
    return Group(table, f"after {text.shape[1]} tokens: {tokenizer.decode(written['offloaded'])!r}")


def _decode(program: gw.Program, text: Tensor) -> tuple[float, float, list[int]]:
    """Perplexity of the last tokens, median seconds of a token, and the tokens that are written after them."""
    program.reset()
    first, losses, spent, written = text.shape[1] - SCORED, [], [], []
    logits = torch.empty(0)
    for low in range(0, first, PIECE):
        logits = program(text[:, low : min(low + PIECE, first)], torch.arange(low, min(low + PIECE, first)))
    for position in range(first, first + SCORED + WRITTEN):
        token = logits[:, -1].argmax(-1, keepdim=True)
        if position < text.shape[1]:
            token = text[:, position : position + 1]
            losses.append(functional.cross_entropy(logits[:, -1].float(), token[0]))
        else:
            written.append(int(token))
        started = time.perf_counter()
        logits = program(token, torch.tensor([position]))
        spent.append(time.perf_counter() - started)
    return float(torch.stack(losses).mean().exp()), sorted(spent)[len(spent) // 2], written
