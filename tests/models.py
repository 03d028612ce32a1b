"""Small models that several tests share: a tiny random Llama, captured once, and plain modules."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import graphwright as gw

VOCABULARY, CACHE = 97, 32


def tiny_llama(**options: Any) -> Any:
    """Two layers, hidden 64, 4 heads in 2 groups."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options)).eval()


def tiny_bloom(**options: Any) -> Any:
    """Two layers, hidden 64, 4 heads, biases of attention by ALiBi."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    return BloomForCausalLM(BloomConfig(**sizes | options)).eval()


@cache
def captured_bloom() -> gw.Captured:
    """The tiny Bloom with a static cache; callers do not change it."""
    return gw.capture_causal_lm(tiny_bloom(), CACHE)


@cache
def captured_llama() -> gw.Captured:
    """The tiny Llama with a static cache; callers do not change it."""
    return gw.capture_causal_lm(tiny_llama(), CACHE)


def tokens(count: int, seed: int = 0) -> Tensor:
    """Random tokens [1, count]."""
    return torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


class Mlp(nn.Module):
    """Two linears with an activation between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))
