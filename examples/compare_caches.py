"""A program with a smaller cache against the one with the full cache: quality, bytes, and time per token."""

from __future__ import annotations

import math

import torch
from rich.console import RenderableType
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.inspection.tables import Table
from graphwright.passes.decision import Decision
from graphwright.profiles.decode_loss import block_of as packed_block_of
from graphwright.profiles.decode_loss import decode_loss, decoded_logits


def compare_caches(smaller: gw.Program, full: gw.Program, windows: Tensor, block: int | None = None) -> RenderableType:
    """A table of both programs.

    The perplexity is that of decoding token by token. The time is that of one token at the last position of the cache,
    on one thread, the programs in turn. Bytes are those of the allocated state.

    Args:
        smaller: A program of `capture_causal_lm` with its cache packed or split.
        full: The same without.
        windows: Tokens [n, S].
        block: Tokens that a call may take, see `decoded_logits`; `block_of` says it of a decision.
    """
    programs = {"full": (full, None), "smaller": (smaller, block)}
    last = torch.tensor([full.facts["max_cache_len"] - 1])
    with one_thread():
        times = interleaved({name: (lambda p=p: p(windows[:1, :1], last)) for name, (p, _) in programs.items()})
    float16 = full.state_bytes() * 2 // _bytes_of_element(full)
    table = Table("cache", "perplexity", "bytes", "of float16", f"ms a token, position {int(last)}")
    agreement = []
    for name, (program, tokens) in programs.items():
        loss = decode_loss(program, list(windows.split(1)), tokens)
        agreement.append(decoded_logits(program, windows[:1], tokens).argmax(-1))
        share = program.state_bytes() / float16
        table.add_row(
            name,
            f"{math.exp(loss):.3f}",
            f"{program.state_bytes() / 1e6:.2f} MB",
            f"{share:.3f}",
            f"{times[name] * 1e3:.1f}",
        )
    same = float((agreement[0] == agreement[1]).float().mean())
    table.caption = f"most probable token the same at {same:.1%} of the first window's positions"
    return table


def block_of(decision: Decision) -> int | None:
    """Tokens that one call may take so that it sees what decoding sees, after what was done to a cache."""
    if decision.pass_name == "split_cache_heads":
        return 1  # a query sees all tokens of its own call, and a window of those before
    return packed_block_of(decision.options["mode"])


def _bytes_of_element(program: gw.Program) -> int:
    return next(t.element_size() for t in program.initial_state().values() if t.is_floating_point())
