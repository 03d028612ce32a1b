"""Small video transformers of five families with random weights, as canonical graphs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.export import ExportedProgram

import graphwright as gw
from graphwright.passes.canonicalize import CANONICALIZERS
from graphwright.passes.edit import copy_exported
from graphwright.passes.manager import PassManager
from tests.patterns import test_grid

FRAMES, HEIGHT, WIDTH = 3, 4, 6
VIDEO = FRAMES * HEIGHT * WIDTH


def cogvideox():
    """With rotary tables that are handed in."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=12, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=7, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (torch.randn(VIDEO, 16), torch.randn(VIDEO, 16)),
    }
    return model, inputs


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=1, caption_channels=16,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, VIDEO, 8),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, 7),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
    }
    return model, inputs


def mochi_of_two():
    """A batch of two: the model attends for each of them by itself."""
    model, inputs, _ = test_grid.mochi()
    return model, {name: torch.cat([value, value]) for name, value in inputs.items()}


MODELS: dict[str, Any] = {
    "wan": lambda: test_grid.wan()[:2],
    "cogvideox": cogvideox,
    "cogvideox without rotary": lambda: test_grid.cogvideox()[:2],
    "hunyuan": lambda: test_grid.hunyuan()[:2],
    "ltx": ltx,
    "mochi": lambda: test_grid.mochi()[:2],
    "mochi of two": mochi_of_two,
}


@cache
def canonical(model: str, dynamic: bool = False) -> ExportedProgram:
    """The canonical program of a model; it is shared, so copy it before a change."""
    torch.manual_seed(0)
    module, inputs = MODELS[model]()
    exported = copy_exported(gw.capture_denoiser(module.eval(), inputs, dynamic_frames=dynamic).exported)
    PassManager(CANONICALIZERS, check_numbers=False).run(exported)
    return exported
