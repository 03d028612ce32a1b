"""A small decoder whose cache is offloaded, for the tests of pass, method and program: 12 pages at hand of 32."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import graphwright as gw
from tests.models import tiny_llama, tokens

LENGTH = 128
SMALL: dict[str, Any] = {"budget": 48, "page": 4, "sinks": 4, "window": 8, "dense_layers": 0}
"""One page of sinks, two of recent tokens, nine to choose."""


@cache
def captured(batch_size: int = 1) -> gw.Captured:
    """Two layers; a batch has padding. Callers do not change it."""
    model = tiny_llama(max_position_embeddings=256)
    # Random queries hardly depend on the text: larger ones tell pages apart, and turn.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 4
    return gw.capture_causal_lm(model, LENGTH, batch_size, padding=batch_size > 1)


@cache
def freekv(batch_size: int = 1, **options: Any) -> gw.Program:
    """Offloaded; callers share it, and start from an empty cache."""
    return gw.optimize(captured(batch_size), methods=[gw.FreeKV(**SMALL | options)], progress=False)


@cache
def canonical(batch_size: int = 1) -> gw.Program:
    """The same with a full cache."""
    return gw.optimize(captured(batch_size), progress=False)


def decoded(program: gw.Program, prompt: int = 60, count: int = 84) -> Tensor:
    """Logits [1, count - prompt + 1, V] of random tokens, decoded one by one after a prompt."""
    ids = tokens(count)
    program.reset()
    steps = [program(ids[:, :prompt], torch.arange(prompt))[:, -1:]]
    steps += [program(ids[:, i : i + 1], torch.tensor([i])) for i in range(prompt, count)]
    return torch.cat(steps, 1)
