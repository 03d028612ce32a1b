"""How far a video is from the one that the dense program makes of the same prompt and seed."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import InvalidArgument, MissingExtra


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio of two videos, in decibels: -10 log10 of the mean squared difference over the peak's.

    Args:
        a: A video or latents of any shape.
        b: The same shape.
        peak: The largest possible difference: 1 for pixels in [0, 1].

    Returns:
        The ratio; infinity where the videos are equal.

    Raises:
        InvalidArgument: The shapes differ.
    """
    _check(a, b)
    error = functional.mse_loss(a.double(), b.double()).item()
    return -10 * math.log10(error / peak**2) if error else math.inf


def ssim(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Structural similarity of two videos [T, C, H, W], mean over frames (Wang et al. 2004), by scikit-image.

    Args:
        a: A video, at least 7 pixels high and wide.
        b: The same shape.
        peak: The largest possible difference.

    Raises:
        InvalidArgument: The shapes differ or are too small.
        MissingExtra: scikit-image is not installed.
    """
    _check(a, b)
    if a.dim() != 4 or min(a.shape[2:]) < 7:
        raise InvalidArgument(f"expected videos [T, C, H, W] of at least 7 x 7 pixels, got {list(a.shape)}")
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise MissingExtra("scikit-image is not installed: pip install 'graphwright[demo]'") from error
    total = 0.0
    for x, y in zip(a.double().cpu(), b.double().cpu(), strict=True):
        found: Any = structural_similarity(x.numpy(), y.numpy(), channel_axis=0, data_range=peak)
        total += float(found)
    return total / len(a)


def compare(reference: Tensor, other: Tensor) -> dict[str, float]:
    """PSNR, and SSIM of pixels where scikit-image is there, of anything that a sampler returned.

    Values in [0, 1] are pixels [..., C, H, W] with a peak of 1; of others, latents, the peak is their range.
    """
    reference, other = reference.detach().float().cpu(), other.detach().float().cpu()
    low, high = float(reference.min()), float(reference.max())
    pixels = low >= 0 and high <= 1 and reference.dim() >= 4
    found = {"psnr": psnr(reference, other, 1.0 if pixels else max(high - low, torch.finfo(torch.float32).tiny))}
    if pixels:
        with suppress(InvalidArgument, MissingExtra):
            frames = (-1, *reference.shape[-3:])
            found["ssim"] = ssim(reference.reshape(frames), other.reshape(frames))
    return found


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InvalidArgument(f"got videos of shapes {list(a.shape)} and {list(b.shape)}, expected equal ones")
