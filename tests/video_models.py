"""The five families of video transformers in tiny configurations with random weights, for a latent grid of any size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import graphwright as gw
from graphwright.passes.canonicalize import CANONICALIZERS
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.manager import PassManager

Made = tuple[nn.Module, dict[str, Any]]
TEXT = 7
HEADS, HEAD_DIM = 2, 32
GRID = 3, 4, 6
"""Frames, height and width in tokens of the programs that `canonical` gives."""


def wan(frames: int, height: int, width: int, layers: int = 1) -> Made:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=8, ffn_dim=32, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
    }


def cogvideox(frames: int, height: int, width: int, layers: int = 1, rotary: bool = True) -> Made:
    """Text first; rotary tables are handed in, if there are any."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=layers, sample_width=2 * width, sample_height=2 * height,
        sample_frames=4 * frames - 3, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    angles = torch.randn(frames * height * width, HEAD_DIM)
    return model, {
        "hidden_states": torch.randn(1, frames, 4, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([500]),
    } | ({"image_rotary_emb": (angles.cos(), angles.sin())} if rotary else {})


def hunyuan(frames: int, height: int, width: int, layers: int = 1) -> Made:
    """Text last, with a mask of its padding; two of the tokens are padding."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=layers,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(8, 12, 12),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "encoder_attention_mask": torch.tensor([[1.0] * (TEXT - 2) + [0.0] * 2]),
        "pooled_projections": torch.randn(1, 8),
    }


def ltx(frames: int, height: int, width: int, layers: int = 1) -> Made:
    """Tokens are handed in; the grid is known from its rotary positions only."""
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM, cross_attention_dim=HEADS * HEAD_DIM, num_layers=layers, caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, frames * height * width, 8),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def mochi(frames: int, height: int, width: int, layers: int = 2) -> Made:
    """Text last, as many tokens as its mask says: the length of the sequence is known when the program runs."""
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=max(layers, 2),
        pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=TEXT,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.tensor([[True] * (TEXT - 1) + [False]]),
    }


FAMILIES: dict[str, Callable[..., Made]] = {make.__name__: make for make in (wan, cogvideox, hunyuan, ltx, mochi)}


def make(family: str, frames: int, height: int, width: int, batch: int = 1, **options: int) -> Made:
    """A model in evaluation mode, seeded, and example inputs for the grid in tokens, repeated `batch` times."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[family](frames, height, width, **options)
    if batch > 1:
        inputs = {name: torch.cat([value] * batch) for name, value in inputs.items()}
    return model.eval().requires_grad_(False), inputs


VARIANTS: dict[str, tuple[str, dict[str, int]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "cogvideox of two layers": ("cogvideox", {"layers": 2}),
    "cogvideox without rotary": ("cogvideox", {"rotary": False}),
    "mochi of two": ("mochi", {"batch": 2}),  # it attends for each of a batch by itself
}
"""Name -> a family and its options."""


@cache
def canonical(variant: str, dynamic: bool = False) -> ExportedProgram:
    """The canonical program of a variant for `GRID`; it is shared, so copy it before a change."""
    family, options = VARIANTS[variant]
    model, inputs = make(family, *GRID, **options)
    exported = copy_exported(gw.capture_denoiser(model, inputs, dynamic_frames=dynamic).exported)
    PassManager(CANONICALIZERS, check_numbers=False).run(exported)
    return exported
