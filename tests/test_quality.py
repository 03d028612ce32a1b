"""PSNR and SSIM: known values, equal videos, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from graphwright.errors import InvalidArgument
from graphwright.quality import compare, psnr, ssim


def test_psnr_of_a_known_difference():
    video = torch.rand(2, 3, 8, 8)
    assert psnr(video, video) == math.inf
    assert psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)) == pytest.approx(20, abs=1e-5)
    assert psnr(torch.zeros(3), torch.full((3,), 0.2), peak=2.0) == pytest.approx(20, abs=1e-5)
    with pytest.raises(InvalidArgument, match="expected equal ones"):
        psnr(video, video[:1])


def test_ssim_is_one_for_equal_videos_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 3, 16, 16, generator=generator)
    little, much = (video + size * torch.randn(video.shape, generator=generator) for size in (0.02, 0.3))
    assert ssim(video, video) == pytest.approx(1.0)
    assert 1 > ssim(video, little) > ssim(video, much)
    with pytest.raises(InvalidArgument, match="at least 7 x 7 pixels"):
        ssim(video[..., :6], video[..., :6])


def test_compare_takes_the_peak_from_the_reference():
    latents = torch.tensor([-4.0, 4.0])
    assert compare(latents, latents + 0.8) == {"psnr": pytest.approx(20, abs=1e-4)}
    video = torch.rand(1, 3, 8, 8)
    assert set(compare(video, video.flip(2))) == {"psnr", "ssim"}
