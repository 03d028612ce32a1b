"""A program with a packed cache against the one in full precision: quality, bytes, and time per token."""

from __future__ import annotations

import math

import torch
from rich.console import RenderableType
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.inspection.tables import Table
from graphwright.profiles.decode_loss import block_of, decode_loss, decoded_logits


def compare_caches(packed: gw.Program, full: gw.Program, windows: Tensor, mode: str) -> RenderableType:
    """A table of both programs.

    The perplexity is that of decoding token by token. The time is that of one token at the last position of the cache,
    on one thread, the programs in turn. Bytes are those of the allocated state.

    Args:
        packed: A program of `capture_causal_lm` with its cache packed.
        full: The same without.
        windows: Tokens [n, S].
        mode: How the cache is packed.
    """
    programs = {"full precision": (full, None), "packed": (packed, block_of(mode))}
    last = torch.tensor([full.facts["max_cache_len"] - 1])
    with one_thread():
        times = interleaved({name: (lambda p=p: p(windows[:1, :1], last)) for name, (p, _) in programs.items()})
    float16 = full.state_bytes() * 2 // _bytes_of_element(full)
    table = Table("cache", "perplexity", "bytes", "of float16", f"ms a token, position {int(last)}")
    agreement = []
    for name, (program, block) in programs.items():
        loss = decode_loss(program, list(windows.split(1)), block)
        agreement.append(decoded_logits(program, windows[:1], block).argmax(-1))
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


def _bytes_of_element(program: gw.Program) -> int:
    return next(t.element_size() for t in program.initial_state().values() if t.is_floating_point())
