"""How much each input channel of a linear weighs: the factors that n:m selection ranks activations by.

    norm          f[k] = ||W[:, k]|| / min_j ||W[:, j]||
    robust_norm   the same of V = (W - mean) / std over the kept entries, the others 0;
                  kept are those between the 0.005 and the 0.995 quantile of the whole matrix          (reading A)
    robust_all    the same of V, where the quantiles set mean and std alone and all entries count      (reading B)
    none          no factors: the activation's magnitude alone

The paper defines the set of kept entries and says that the others are removed; what a removed entry adds to its
column's norm it leaves open. Reading A takes it by the word. Since a weight's mean is close to 0, reading B is the
plain norm up to a constant.

Source: Amber Pruner (arXiv:2508.02128), Robust-Norm Scoring; Wanda (Sun et al. 2023, arXiv:2306.11695) for the norm of
a column times the magnitude of an activation.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidArgument

Scoring = Literal["robust_norm", "robust_all", "norm", "none"]
SCORINGS: tuple[str, ...] = get_args(Scoring)
TAIL = 0.005
"""Share of the entries that is removed at each end (the paper's quantiles)."""


def channel_factors(weight: Tensor, scoring: str) -> Tensor | None:
    """Factors of a weight's input channels.

    Args:
        weight: Float [N, K].
        scoring: One of `SCORINGS`.

    Returns:
        float32 [K], at least 1 but for columns of zeros, which get 0; None for "none".

    Raises:
        InvalidArgument: An unknown scoring, no float matrix, or NaN or infinity in it.
    """
    if scoring not in SCORINGS:
        raise InvalidArgument(f"got scoring {scoring!r}, expected {' or '.join(SCORINGS)}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InvalidArgument(f"got a weight {weight.dtype}{list(weight.shape)}, expected a float matrix [N, K]")
    if scoring == "none":
        return None
    values = weight.detach().float()
    if not values.isfinite().all():
        raise InvalidArgument("the weight has NaN or infinity, expected finite values")
    if scoring != "norm":
        values = _standardised(values, counts_all=scoring == "robust_all")
    norms = torch.linalg.vector_norm(values, dim=0, dtype=torch.float64)
    alive = norms > 0
    if not alive.any():
        return torch.zeros(weight.shape[1], device=weight.device)
    return (norms / norms[alive].min()).float()


def _standardised(values: Tensor, counts_all: bool) -> Tensor:
    low, high = _quantile(values, TAIL), _quantile(values, 1 - TAIL)
    kept = (values >= low) & (values <= high)
    inside = values[kept].double()
    mean, std = inside.mean(), inside.std(correction=0).clamp_min(1e-30)
    result = (values - mean.float()) / std.float()
    return result if counts_all else torch.where(kept, result, 0.0)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The nearest entry to a quantile; torch.quantile refuses more than 2^24 values."""
    return values.flatten().kthvalue(round(share * (values.numel() - 1)) + 1).values
