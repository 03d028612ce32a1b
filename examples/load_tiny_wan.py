"""The small video diffusion transformer in `examples/models/tiny_wan`, with its prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from graphwright.examples.extra import demo_extra

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_FOLDER = Path(__file__).parent / "models" / "tiny_wan"
# The order of the embeddings in prompts.safetensors.
_PROMPTS = ("bikes", "bunny", "carphone", "discs")


def load_tiny_wan(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """Load the transformer: 8 blocks, 4 heads of 64, 12 latent channels, 9 million parameters.

    Args:
        dtype: The weights' dtype; they are stored in bfloat16 and were trained in float32, with bfloat16 products.

    Returns:
        The model, in evaluation mode and without gradients, on the CPU.

    Raises:
        MissingExtra: diffusers is not installed.
    """
    with demo_extra():
        from diffusers import WanTransformer3DModel
    config = json.loads((_FOLDER / "config.json").read_text(encoding="utf-8"))
    model = WanTransformer3DModel(**{name: value for name, value in config.items() if not name.startswith("_")})
    weights = load_file(_FOLDER / "model.safetensors")
    # Assigned and not cast with `to`, which would round the rotary frequencies too.
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def load_prompts() -> dict[str, Tensor]:
    """The prompt embeddings by name ("bikes", "bunny", "carphone", "discs"), each float32 [1, 4, 32]."""
    text = load_file(_FOLDER / "prompts.safetensors")["text"]
    return {name: embedding[None] for name, embedding in zip(_PROMPTS, text, strict=True)}
