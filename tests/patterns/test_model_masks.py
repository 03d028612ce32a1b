"""The masks of transformers models, exported with random weights, are what their configs say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.patterns.masks import MaskFact

from .mask_forms import B, S, facts

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


class Model(nn.Module):
    """A model with its inputs by name and its first output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, input_ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        decodes = hasattr(self.model, "lm_head")
        return self.model(input_ids=input_ids, **inputs, **({"use_cache": False} if decodes else {}))[0]


class StaticModel(nn.Module):
    """A decoder over key and value buffers of fixed length, which it writes from `positions[0]` on."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model, self.length = model.eval(), length
        for layer in range(model.config.num_hidden_layers):
            self.register_buffer(f"keys{layer}", torch.zeros(1, 2, length, 16))
            self.register_buffer(f"values{layer}", torch.zeros(1, 2, length, 16))

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        from transformers.cache_utils import StaticCache, StaticLayer

        cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        layers: list[Any] = [StaticLayer(self.length) for _ in cache.layers]
        cache.layers = layers
        for index, layer in enumerate(layers):
            layer.keys, layer.values = getattr(self, f"keys{index}"), getattr(self, f"values{index}")
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.batch_size, layer.num_heads, layer.k_head_dim, layer.v_head_dim = 1, 2, 16, 16
            layer.cumulative_length, layer.is_initialized = positions[0].clone(), True
        return self.model(input_ids=input_ids, position_ids=positions[None], past_key_values=cache).logits


IDS = torch.arange(24).reshape(2, 12)


def export(module: nn.Module, **inputs: Tensor) -> list[MaskFact]:
    sizes = {0: B, 1: S}
    dynamic = {"input_ids": sizes, "inputs": dict.fromkeys(inputs, sizes)}
    return facts(torch.export.export(module, (IDS, inputs), dynamic_shapes=dynamic, strict=False))


def build(name: str, head: str = "ForCausalLM", **options: Any) -> Any:
    """A transformers model with random weights; the options are its config's."""
    import transformers

    torch.manual_seed(0)
    settled = getattr(transformers, f"{name}Config")(**(SMALL | options))
    return getattr(transformers, f"{name.removesuffix('Text')}{head}")(settled)


GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
GEMMA = GROUPED | {
    "head_dim": 16,
    "sliding_window": 8,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 256}


@pytest.mark.parametrize(
    ("name", "options", "padded", "expected"),
    [
        ("Llama", GROUPED, False, [("causal", None)]),
        ("Llama", GROUPED | {"attn_implementation": "eager"}, True, [("causal", None)]),
        ("Mistral", GROUPED | {"sliding_window": 100}, False, [("causal", 100)]),
        ("Gemma2", GEMMA, False, [("causal", 8), ("causal", None)]),
        ("Gemma3Text", GEMMA, True, [("causal", 8), ("causal", None)]),
        ("GPT2", GPT2, False, [("causal", None)]),
    ],
)
def test_decoders(name: str, options: dict[str, Any], padded: bool, expected: list[tuple[str, int | None]]):
    model = Model(build(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM", **options))
    inputs = {"attention_mask": torch.ones_like(IDS)} if padded else {}
    found = export(model, **inputs)
    assert [(fact.kind, fact.window) for fact in found] == expected, [fact.reason for fact in found]
    for fact in found:
        assert (fact.padding is not None) == padded
        assert fact.positions is None
        assert fact.every_row_sees_a_key == (not padded)
        assert fact.additive == (options.get("attn_implementation") == "eager" or name == "Gemma2")


def test_packed_positions_are_not_causal():
    (fact,) = export(Model(build("Llama", **GROUPED)), position_ids=torch.arange(12).repeat(2, 1))
    assert fact.kind == "unknown"
    assert "position_ids" in fact.reason


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder_with_padding(attention: str):
    model = Model(build("Bert", "Model", attn_implementation=attention))
    (fact,) = export(model, attention_mask=torch.ones_like(IDS))
    assert (fact.kind, fact.window, fact.additive) == ("padding", None, attention == "eager"), fact.reason
    assert fact.padding is not None


def test_vision_encoder():
    model = build("ViT", "Model", image_size=16, patch_size=4).eval()
    (fact,) = facts(torch.export.export(model, (torch.randn(2, 3, 16, 16),), strict=False))
    assert (fact.kind, fact.every_row_sees_a_key) == ("always", True)


@pytest.mark.parametrize(("name", "window"), [("Llama", None), ("Mistral", 8)])
def test_static_cache(name: str, window: int | None):
    options = GROUPED | ({"sliding_window": window} if window else {})
    module = StaticModel(build(name, **options), 32)
    sizes = {"input_ids": {1: S}, "positions": {0: S}}
    exported = torch.export.export(module, (IDS[:1], torch.arange(12)), dynamic_shapes=sizes, strict=False)
    (fact,) = facts(exported)
    assert (fact.kind, fact.window, fact.per_row) == ("cache_causal", window, False), fact.reason
    assert fact.positions is not None
    assert fact.positions.name == "positions"
    assert fact.every_row_sees_a_key
