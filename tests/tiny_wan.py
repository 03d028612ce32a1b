"""The trained Wan model, cut to its first two blocks: real queries and keys, and samplings of a second."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import graphwright as gw
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.examples.sample_video import noise_levels, sample

STEPS, LAYERS = 6, 2
FRAMES, SIZE = 4, 32
"""256 tokens."""


@cache
def captured(steps: int = STEPS) -> gw.Captured:
    """The model, captured with the timesteps of a run of so many steps."""
    model = load_tiny_wan()
    model.blocks = model.blocks[:LAYERS]
    inputs = {
        "hidden_states": torch.zeros(1, 12, FRAMES, SIZE // 2, SIZE // 2),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": load_prompts()["bikes"],
    }
    return gw.capture_denoiser(model, inputs, timesteps=1000 * noise_levels(steps)[:-1])


def sampler(denoise, seed: int = 1, steps: int = STEPS) -> Tensor:
    """A video of the prompt of the capture."""
    prompt = load_prompts()["bikes"]
    return sample(denoise, prompt, frames=FRAMES, height=SIZE, width=SIZE, steps=steps, seed=seed, progress=False)
