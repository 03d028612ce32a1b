"""Fit a rotation to activations so that few bits hold them: the Whip loss over QR-Orth.

    Whip(o) = sum_i exp(-|o_i|), averaged over tokens,     o = x R           R = Q of the QR decomposition of Z

The length of a token does not change under R, so entries that are pushed away from zero take from the outliers: the
distribution moves from Laplace's towards the uniform one. R is orthogonal by construction, at every step, and plain SGD
runs on Z; the loss does not change when Z is multiplied by a triangular matrix, so Z only grows and the steps shrink.

Source: DartQuant (arXiv:2511.04063), sections 4.1 and 4.2. Momentum 0.9 and the start at a Hadamard matrix with random
signs are the published code's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidArgument
from ..kernels.hadamard import matrix
from ..kernels.token_grid import quantize_tokens

MOMENTUM = 0.9
Schedule = Literal["constant", "cosine"]


def whip(rotated: Tensor) -> Tensor:
    """The loss of rotated tokens [.., T, n]: summed over channels, averaged over tokens, summed over the rest."""
    return rotated.abs().neg().exp().sum(-1).mean(-1).sum()


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix (in blocks where there is none) with random row signs, float32 [n, n]."""
    signs = torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
    return (matrix(n) * signs).float()


def fit_rotation(
    tokens: Tensor,
    start: Tensor,
    *,
    steps: int,
    lr: float,
    batch: int,
    generator: torch.Generator,
    schedule: Schedule = "constant",
    loss: Callable[[Tensor], Tensor] = whip,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Fit an orthogonal R.

    Args:
        tokens: float32 [.., T, n]; leading dimensions are separate problems, such as heads.
        start: Z at the start, float32 [.., n, n].
        steps: Updates.
        lr: Learning rate of SGD.
        batch: Tokens of a step, drawn uniformly with replacement.
        generator: Draws them.
        schedule: Of the learning rate: "cosine" lets it fall to zero.
        loss: Of rotated tokens.
        on_step: Called after each step.

    Returns:
        R, float32 [.., n, n], orthogonal to about 1e-6.

    Raises:
        InvalidArgument: The tokens hold NaN or infinity.
    """
    if not all(end.isfinite() for end in tokens.aminmax()):  # without a copy of them
        raise InvalidArgument("the activations hold NaN or infinity, no rotation can be fitted to them")
    latent = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([latent], lr=lr, momentum=MOMENTUM)
    with torch.enable_grad():
        for step in range(steps):
            if schedule == "cosine":
                optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            rows = torch.randint(0, tokens.shape[-2], (min(batch, tokens.shape[-2]),), generator=generator)
            optimizer.zero_grad()
            loss(tokens[..., rows, :] @ torch.linalg.qr(latent).Q).backward()
            optimizer.step()
            if on_step is not None:
                on_step()
    return torch.linalg.qr(latent.detach()).Q


def rounding_error(tokens: Tensor, bits: int, clip: float) -> float:
    """Relative squared error of tokens [T, n] rounded to some bits, asymmetric, each by itself.

    The measure of the paper's comparisons: what a rotation is for, without any weight.
    """
    values, step, _ = quantize_tokens(tokens.float(), bits, clip)
    difference = values * step - tokens.float()
    return float(difference.square().sum() / tokens.float().square().sum().clamp_min(1e-30))
