"""The measurements of sparse video attention run and measure what they say, on a video of 256 tokens in three steps."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import graphwright as gw
from graphwright.benchmarks import video
from graphwright.benchmarks.timing import one_thread
from graphwright.benchmarks.video_pictures import SIDE, write_frames, write_masks


@pytest.fixture(scope="module")
def setting():
    with one_thread():
        yield video.Setting(frames=4, size=32, steps=3, prompts=("bikes",))


def test_full_bands_give_the_dense_video(setting):
    assert setting.tokens == 256
    found = video.quality(setting, gw.RainFusion(dense_steps=0.34, sparsity=1e-9, alpha=0.0))
    assert found["density"] == 1.0
    assert found["recall"] == pytest.approx(1, abs=1e-4)
    assert found["psnr"] > 80


def test_whole_samplings_are_timed_and_compared(setting):
    found = video.whole_sampling(setting, {"rainfusion": gw.RainFusion(dense_steps=0.34)}, rounds=1)
    assert found["dense"]["speedup"] == 1.0
    assert found["dense"]["density"] == 1.0
    sparse = found["rainfusion"]
    assert sparse["density"] < 1
    assert sparse["speedup"] == pytest.approx(found["dense"]["seconds"] / sparse["seconds"])
    assert 10 < sparse["psnr"] < 80


def test_methods_are_compared_at_one_density(setting):
    found = video.equal_density(setting, 0.34, cost=1.0, recall=0.8)
    compact, _, chance = found.values()
    assert chance["density"] == pytest.approx(compact["density"], abs=0.15)
    assert compact["recall"] > chance["recall"]


def test_random_blocks_are_as_dense_as_asked_for():
    setting = video.Setting(frames=8, size=64, steps=2, prompts=("bikes",))
    wanted = 0.6
    frame = 1 / 8
    (share,) = {
        round(options["share"], 6)
        for options in (
            proposal.options
            for proposal in video.RandomBlocks(density=wanted).propose([_place(setting)], None).values()
        )
    }
    protected = 2 * frame - frame**2
    assert protected + (1 - protected) * share == pytest.approx(wanted)


def _place(setting):
    from graphwright.patterns.video import VideoLayout
    from graphwright.profiles.video import Place

    site = setting.dense.sites["main"].attention[0]
    return Place("main", site, VideoLayout(*setting.grid, 0, 0, None))


def test_sparsity_for_a_density_is_found_by_bisection():
    setting = video.Setting(frames=16, size=64, steps=2)
    for wanted in (0.5, 0.7):
        found = video.sparsity_for(setting, wanted)
        assert video._band_density(setting, found) == pytest.approx(wanted, abs=0.05)


def test_pictures_show_frames_and_the_masks_of_each_type(tmp_path):
    videos = {name: torch.rand(8, 3, 16, 16) for name in ("dense", "sparse")}
    write_frames(tmp_path / "frames.png", videos)
    with Image.open(tmp_path / "frames.png") as picture:
        assert picture.size == (8 * 16 * 2, 2 * 16 * 2)
    assert write_masks(tmp_path / "masks.png", (5, 8, 8)) == ("temporal", "spatial", "textural")
    with Image.open(tmp_path / "masks.png") as picture:
        assert picture.size == (3 * SIDE + 2 * 8, SIDE)
        values = torch.tensor(list(picture.get_flattened_data())).view(SIDE, -1)[:, :SIDE]
    first = SIDE // 5  # the first frame is dense as rows and as columns; elsewhere something is left out
    assert values[: first - 1].min() == 255
    assert values[:, : first - 1].min() == 255
    assert values[first + 1 :, first + 1 :].min() == 0
