"""Factors of input channels: each scoring against its formula, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphwright.errors import InvalidArgument
from graphwright.kernels.channel_factors import SCORINGS, channel_factors

WEIGHT = torch.randn(90, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 40) + 0.1


def by_numpy(weight: torch.Tensor, counts_all: bool) -> np.ndarray:
    """Readings A and B in float64; the quantiles are the nearest entries."""
    w = weight.double().numpy()
    low, high = (np.quantile(w, q, method="nearest") for q in (0.005, 0.995))
    kept = (w >= low) & (w <= high)
    standardised = (w - w[kept].mean()) / w[kept].std()
    norms = np.sqrt((standardised**2 * (1 if counts_all else kept)).sum(0))
    return norms / norms.min()


def test_norm_is_the_norm_of_columns():
    norms = WEIGHT.double().norm(dim=0)
    torch.testing.assert_close(channel_factors(WEIGHT, "norm"), (norms / norms.min()).float())


@pytest.mark.parametrize(("scoring", "counts_all"), [("robust_norm", False), ("robust_all", True)])
def test_robust_norms_follow_their_reading(scoring, counts_all):
    wanted = torch.from_numpy(by_numpy(WEIGHT, counts_all)).float()
    torch.testing.assert_close(channel_factors(WEIGHT, scoring), wanted)


def test_an_outlier_counts_in_reading_b_alone():
    weight = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    spiked = weight.clone()
    spiked[3, 5] = 1000.0
    change = {s: channel_factors(spiked, s)[5] / channel_factors(weight, s)[5] for s in ("robust_norm", "robust_all")}
    assert 0.9 < change["robust_norm"] < 1.1
    assert change["robust_all"] > 10


def test_dead_columns_get_zero_and_none_has_no_factors():
    weight = WEIGHT.clone()
    weight[:, 7] = 0
    factors = channel_factors(weight, "norm")
    assert factors[7] == 0
    assert factors[factors > 0].min() == 1
    assert channel_factors(torch.zeros(4, 8), "norm").tolist() == [0.0] * 8
    assert channel_factors(weight, "none") is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    got = channel_factors(WEIGHT.to(dtype), "robust_norm")
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, channel_factors(WEIGHT.to(dtype).float(), "robust_norm"))


@pytest.mark.parametrize(
    ("weight", "scoring", "reason"),
    [
        (WEIGHT, "l1", "got scoring 'l1'"),
        (WEIGHT.to(torch.int8), "norm", "expected a float matrix"),
        (WEIGHT[0], "norm", "expected a float matrix"),
        (torch.full((2, 4), float("nan")), "norm", "has NaN or infinity"),
    ],
)
def test_refuses(weight, scoring, reason):
    assert "robust_norm" in SCORINGS
    with pytest.raises(InvalidArgument, match=reason):
        channel_factors(weight, scoring)
