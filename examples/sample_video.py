"""Sample videos from the small transformer by flow matching, compare them, and write them as a picture.

The constants (latent scale, sigma shift, timesteps) are those that the model was trained with, from the README beside
it in `models/tiny_wan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphwright.errors import InvalidArgument
from graphwright.examples.extra import demo_extra
from graphwright.progress import Progress

_LATENT_SCALE = 1.6
_LATENT_STRIDE = 2
_LATENT_CHANNELS = 3 * _LATENT_STRIDE**2
# The transformer takes patches of 2x2 latents.
_TOKEN_PIXELS = 2 * _LATENT_STRIDE
_SIGMA_SHIFT = 3.0
_TIMESTEPS = 1000.0


def sample(
    denoise: Callable[..., Any],
    prompt_embedding: Tensor,
    *,
    frames: int,
    height: int,
    width: int,
    steps: int = 30,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Sample a video: Euler steps from noise along the predicted velocity.

    Args:
        denoise: Called as diffusers calls the transformer, `denoise(hidden_states=[1, 12, T, H/2, W/2], timestep=[1],
            encoder_hidden_states=[1, L, C])`; gives the velocity (noise minus data) in the shape of `hidden_states`, as
            a tensor or as the first item of its output.
        prompt_embedding: [1, L, C]. Its device and dtype are those that `denoise` is called with; the timestep and the
            steps themselves are float32.
        frames: Number of frames T.
        height: Pixels, a multiple of 4.
        width: Pixels, a multiple of 4.
        steps: Number of denoising steps.
        seed: Of the noise, which is the same on every device.
        progress: Show a progress bar, if standard error is a terminal.

    Returns:
        The video, float32 [T, 3, H, W] in [0, 1].

    Raises:
        InvalidArgument: a size that makes no whole number of tokens, or fewer than one frame or step.
    """
    if frames < 1 or steps < 1:
        raise InvalidArgument(f"got frames={frames} and steps={steps}, expected at least 1 of each")
    if min(height, width) < 1 or height % _TOKEN_PIXELS or width % _TOKEN_PIXELS:
        raise InvalidArgument(f"got {height}x{width} pixels, expected multiples of {_TOKEN_PIXELS}")
    shape = (1, _LATENT_CHANNELS, frames, height // _LATENT_STRIDE, width // _LATENT_STRIDE)
    device, dtype = prompt_embedding.device, prompt_embedding.dtype
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    sigmas = noise_levels(steps)
    with torch.no_grad(), Progress(progress) as bar, bar.stage("denoising", steps):
        for sigma, lower in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            output = denoise(
                hidden_states=latent.to(dtype),
                timestep=torch.tensor([_TIMESTEPS * sigma], device=device),
                encoder_hidden_states=prompt_embedding,
            )
            velocity = output if isinstance(output, Tensor) else output[0]
            latent = latent + (lower - sigma) * velocity.float()
            bar.step()
    return latent_to_video(latent)


def noise_levels(steps: int) -> Tensor:
    """The sigmas of a sampling run, float32 [steps + 1], from 1 (noise) down to 0 (data), denser near 1."""
    even = torch.linspace(1, 0, steps + 1)
    return _SIGMA_SHIFT * even / (1 + (_SIGMA_SHIFT - 1) * even)


def video_to_latent(video: Tensor) -> Tensor:
    """Latent [1, 12, T, H/2, W/2] of a video [T, 3, H, W] in [0, 1]: no network, pixels become channels."""
    return _LATENT_SCALE * functional.pixel_unshuffle(2 * video - 1, _LATENT_STRIDE).transpose(0, 1)[None]


def latent_to_video(latent: Tensor) -> Tensor:
    """Video [T, 3, H, W] in [0, 1] of a latent [1, 12, T, H/2, W/2]; what lies outside is clamped."""
    frames = functional.pixel_shuffle(latent[0].transpose(0, 1) / _LATENT_SCALE, _LATENT_STRIDE)
    return ((frames + 1) / 2).clamp(0, 1)


def write_png_grid(path: str | Path, videos: Sequence[Tensor], frames: Sequence[int], zoom: int = 2) -> None:
    """Write frames of videos as one PNG: a row for each video, a column for each frame.

    Args:
        path: Where to write; an existing file is replaced.
        videos: Videos [T, 3, H, W] in [0, 1], of one size.
        frames: Which frames to show.
        zoom: Pixels of the picture for a pixel of the video, along each side.

    Raises:
        InvalidArgument: no video or frame is given, the videos differ in size, or they lack one of the frames.
        MissingExtra: Pillow is not installed.
    """
    if not videos or not frames or zoom < 1:
        raise InvalidArgument(
            f"got {len(videos)} videos, {len(frames)} frames and zoom={zoom}, expected at least 1 each"
        )
    if any(video.shape != videos[0].shape for video in videos):
        raise InvalidArgument(f"got videos of shapes {[list(video.shape) for video in videos]}, expected equal ones")
    if not all(0 <= frame < len(videos[0]) for frame in frames):
        raise InvalidArgument(f"got frames {list(frames)} of videos with {len(videos[0])} frames")
    with demo_extra():
        from PIL import Image
    rows = [torch.cat([video[frame] for frame in frames], dim=-1) for video in videos]
    grid = torch.cat(rows, dim=-2).cpu()
    pixels = (grid * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    picture = pixels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    Image.fromarray(picture.numpy()).save(path, format="PNG")
