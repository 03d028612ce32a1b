"""How one half of a key-value cache lies in memory where only its first and last tokens are kept.

A store is [B, H, S, D] in the cache's dtype. Along S, for each sequence and head:

    mean    1 slot (2 of a 16-bit dtype)    the mean of all tokens that were dropped, float32, whatever the dtype
    stand   the same slot (a third one)     the mean in the cache's dtype: what attention reads
    sinks   N0 slots                        the first N0 tokens of the sequence
    ring    R slots                         the last R tokens, the one at position p in slot p mod R

How many tokens each part holds follows from the position up to which tokens were written, so nothing is counted: before
the token at position f is written, the ring holds the positions max(0, f - R) to f - 1, and of a sequence that begins
at s

    dropped(f) = max(0, f - R - s - N0)

tokens are in the mean. A sink may be in the ring as well: there it is hidden. For the same reason a store cannot go
back: what left the ring is in the mean for good. Writing from position 0 starts anew.

Source: RazorAttention (Tang et al. 2024, arXiv 2407.15891), section 3.3 and algorithm 1: sinks, a recent window, and
one compensation token. That its mean goes on while tokens are generated, and in float32, is how the paper was read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """Views of a store [B, H, S, D].

    Attributes:
        mean: float32 [B, H, D].
        stand: [B, H, D], the mean in the store's dtype; the same memory where that is float32.
        sinks: [B, H, N0, D].
        ring: [B, H, R, D].
        seen: [B, H, 1 + N0 + R, D], what attention reads: stand, sinks and ring.
    """

    mean: Tensor
    stand: Tensor
    sinks: Tensor
    ring: Tensor
    seen: Tensor


def slots_before_sinks(dtype: torch.dtype) -> int:
    """Slots of mean and stand."""
    return 1 if dtype == torch.float32 else 3


def slots_for(sinks: int, window: int, dtype: torch.dtype) -> int:
    """S, for so many sinks and recent tokens."""
    return slots_before_sinks(dtype) + sinks + window


def window_of(slots: int, sinks: int, dtype: torch.dtype) -> int:
    """R, of a store of S slots; less than one where S is too few."""
    return slots - sinks - slots_before_sinks(dtype)


def refuse_slots(slots: int, sinks: int, dtype: torch.dtype) -> str | None:
    """Why a store of S slots cannot be, None where it can."""
    if window_of(slots, sinks, dtype) < 1:
        return f"got {slots} slots, expected at least {slots_for(sinks, 1, dtype)} for {sinks} sinks and a token"
    return None


def parts(store: Tensor, sinks: int) -> Parts:
    """The parts of a store, as views of it."""
    lead = slots_before_sinks(store.dtype)
    mean = store[:, :, 0] if lead == 1 else store[:, :, : lead - 1].flatten(2).view(torch.float32)
    return Parts(
        mean,
        store[:, :, lead - 1],
        store[:, :, lead : lead + sinks],
        store[:, :, lead + sinks :],
        store[:, :, lead - 1 :],
    )


def dropped(position: int, window: int, sinks: int, start: int = 0) -> int:
    """Tokens in the mean before the token at `position` is written."""
    return max(0, position - window - start - sinks)
