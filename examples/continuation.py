"""Perplexity of a text's second half behind its first: what a sparse prompt does to what is generated from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

import graphwright as gw


def continuation_perplexity(program: gw.Program, windows: Tensor) -> float:
    """The first half of each window is one prefill; the rest extends its cache and is scored.

    The first token of the second half is predicted by the prefill, the others by the phase that extends a cache, which
    is dense under methods that change the prefill alone.

    Args:
        program: A program of `capture_causal_lm`; its state is reset.
        windows: Tokens [n, S].
    """
    half, total = windows.shape[1] // 2, 0.0
    for window in windows:
        program.reset()
        first = program(window[None, :half], torch.arange(half))[0, -1:]
        rest = program(window[None, half:], torch.arange(half, len(window)))[0, :-1]
        total += float(functional.cross_entropy(torch.cat([first, rest]).float(), window[half:], reduction="sum"))
    return math.exp(total / (len(windows) * (windows.shape[1] - half)))
