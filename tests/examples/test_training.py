"""Training the small video model: what it is shown, how it steps, what it writes; and where its heads look."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from torch import nn
from torch.nn import functional

from graphwright.errors import InvalidArgument, MissingExtra
from graphwright.examples import load_tiny_wan
from graphwright.examples.load_tiny_wan import load_prompts
from graphwright.examples.measure_heads import head_shares
from graphwright.examples.muon import Muon, orthogonal
from graphwright.examples.sample_video import video_to_latent
from graphwright.examples.train_tiny_wan import CONFIG, SIZES, Size, Training, flow_matching_loss, train
from graphwright.examples.training_clips import COLUMNS, ROWS, Footage, decode_clips, draw_shapes

ONE_LAYER = {**CONFIG, "num_layers": 1, "ffn_dim": 128}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clip(*levels: tuple[int, int]) -> torch.Tensor:
    """A clip whose frames are grey, in runs of (frames, level)."""
    runs = [torch.full((frames, 3, ROWS, COLUMNS), level, dtype=torch.uint8) for frames, level in levels]
    return torch.cat(runs)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def clips() -> dict[str, torch.Tensor]:
    return {"bikes": clip((10, 0), (20, 200)), "bunny": clip((12, 100)), "carphone": clip((12, 50))}


# ---- what it is shown


def test_prompts_take_turns_and_a_window_lies_in_one_scene(clips):
    videos, kinds = Footage(clips).draw(16, 4, 32, generator())
    assert videos.shape == (16, 4, 3, 32, 32)
    assert kinds.bincount().tolist() == [4, 4, 4, 4]
    levels = {kind: {round(255 * float(level)) for level in videos[kinds == kind].unique()} for kind in range(3)}
    assert levels[0] <= {0, 200}
    assert (levels[1], levels[2]) == ({100}, {50})
    bikes = videos[kinds == 0].flatten(1)
    assert torch.equal(bikes, bikes[:, :1].expand_as(bikes)), "no window has frames of two scenes"


def test_windows_take_every_other_frame(clips):
    counting = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 3, ROWS, COLUMNS).contiguous()
    videos, kinds = Footage({**clips, "bunny": counting}).draw(16, 4, 16, generator())
    frames = (255 * videos[kinds == 1][:, :, 0, 0, 0]).round()
    assert torch.equal(frames.diff(dim=1), torch.full((4, 3), 2.0))
    assert len(frames[:, 0].unique()) > 1


def test_views_move_but_show_nearly_everything(clips):
    ramp = torch.linspace(0, 255, COLUMNS).to(torch.uint8).expand(12, 3, ROWS, COLUMNS).contiguous()
    videos, kinds = Footage({**clips, "bunny": ramp}).draw(32, 1, 64, generator())
    row = 255 * videos[kinds == 1][:, 0, 0, 0]
    # A view is 64 of 72 rows and 88 columns wide, so 63 steps of 255 / 88.
    torch.testing.assert_close(row[:, -1] - row[:, 0], torch.full((8,), 63 * 255 / 88), rtol=0, atol=3)
    assert row[:, 0].std() > 5


def test_footage_refuses_what_it_cannot_show(clips):
    with pytest.raises(InvalidArgument, match="no scene of bunny has 15 frames"):
        Footage(clips).draw(4, 8, 32, generator())
    with pytest.raises(InvalidArgument, match=r"clip bunny: got torch.uint8 \[2, 3, 8, 8\]"):
        Footage({"bunny": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)})


def test_shapes_move_and_follow_the_seed():
    first, again, other = (draw_shapes(6, 8, 32, generator(seed), "cpu") for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1
    assert ((first[:, 1:] - first[:, :-1]).abs().amax((1, 2, 3, 4)) > 0.05).all()


def test_a_missing_decoder_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match="av is not installed: pip install av, and pip install --no-deps"):
        decode_clips()


# ---- how it steps


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_newton_schulz_keeps_singular_vectors_and_evens_values(shape):
    matrix = torch.randn(2, *shape, generator=generator())
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.mT @ orthogonal(matrix).float() @ right.mT
    values = inside.diagonal(dim1=1, dim2=2)
    # A square matrix has singular values near zero, which five steps do not lift all the way.
    assert values.max() < 1.3
    assert values.median() > 0.6
    # Off the diagonal only roundings to bfloat16 remain, of five iterations.
    assert (inside - torch.diag_embed(values)).abs().max() < 0.05


def test_muon_steps_have_the_size_of_the_rate():
    weights = [nn.Parameter(torch.randn(16, 48, generator=generator(seed))) for seed in range(2)]
    before = [weight.detach().clone() for weight in weights]
    optimizer = Muon(weights, lr=0.1, weight_decay=0.0)
    for scale, weight in zip((1e-3, 1e3), weights, strict=True):
        weight.grad = scale * torch.randn(16, 48, generator=generator(7))
    optimizer.step()
    for old, new in zip(before, weights, strict=True):
        step = (old - new.detach()).norm() / (0.1 * 0.2 * 48**0.5 * 16**0.5)
        assert 0.7 < step < 1.2, "whatever the size of the gradient"
    with pytest.raises(InvalidArgument, match=r"shape \[3\], expected matrices"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_the_true_velocity_has_no_loss(clips):
    videos, kinds = Footage(clips).draw(4, 2, 16, generator())
    data = torch.cat([video_to_latent(video) for video in videos])
    sigmas = []

    def exact(mixed, timestep, prompts, return_dict):
        sigma = (timestep / 1000)[:, None, None, None, None]
        sigmas.append(timestep / 1000)
        return ((mixed - data) / sigma,)

    prompts = torch.cat(list(load_prompts().values()))[kinds]
    # Both are differences of float32 numbers up to 5, divided by a sigma that is 0.01 or more here.
    assert flow_matching_loss(exact, videos, prompts, generator(3)) < 1e-8  # pyright: ignore[reportArgumentType]
    even = sigmas[0] / (3 - 2 * sigmas[0])
    assert (4 * even).floor().sort().values.tolist() == [0, 1, 2, 3], "one in each quarter of the schedule"


# ---- what it writes


def test_two_steps_write_a_model_that_loads(clips, tmp_path, monkeypatch):
    training = Training(steps=2, tokens=64, sizes=[Size(2, 16, 1, 1)], config=ONE_LAYER)
    trained = train(clips, training, tmp_path)
    assert [record["step"] for record in training.curve] == [2]
    assert training.curve[0]["loss"]["2x16x16"] > 0
    facts = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert (facts["device"], facts["steps"], facts["curve"]) == ("CPU", 2, training.curve)
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (640, 360)
    monkeypatch.setattr(load_tiny_wan, "_FOLDER", tmp_path)
    loaded = load_tiny_wan.load_tiny_wan()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name].to(torch.bfloat16).float()), name
    assert all(torch.equal(load_prompts()[name], prompt) for name, prompt in load_tiny_wan.load_prompts().items())


def test_training_ends_with_the_time(clips, tmp_path):
    training = Training(minutes=1e-6, tokens=64, sizes=[Size(2, 16, 1, 1)], config=ONE_LAYER)
    train(clips, training, tmp_path)
    assert [record["step"] for record in training.curve] == [1]
    assert Training(minutes=1e6, steps=4).done(1) == 0.25


def test_the_shipped_model_is_the_configured_one():
    model = load_tiny_wan.load_tiny_wan()
    assert {name: model.config[name] for name in CONFIG} == CONFIG
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_016_624
    assert max(size.tokens for size in SIZES) == 16384


# ---- where its heads look


def test_head_shares_of_known_attention():
    """Uniform attention has the shares of all pairs."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**ONE_LAYER).eval()
    nn.init.zeros_(model.blocks[0].attn1.to_q.weight)
    nn.init.zeros_(model.blocks[0].attn1.to_q.bias)
    inputs = {
        "hidden_states": torch.randn(1, 12, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": load_prompts()["discs"],
    }
    (heads,) = head_shares(model, inputs)
    assert len(heads) == 4
    near = functional.avg_pool1d(torch.ones(1, 1, 8), 3, 1, padding=1).mean() * 3 / 8  # of the pairs of 8, |i - j| <= 1
    wide = torch.ones(8, 8).tril(2).triu(-2).mean()
    for head in heads:
        # Every third query is looked at, which changes the means by a little.
        assert head.temporal == pytest.approx(float(near**2), abs=0.01)
        assert head.local == pytest.approx(float(wide**2) / 4, abs=0.01)
        assert head.band_temporal == pytest.approx(1 - (1 - 0.29) ** 2, abs=0.01)
        assert head.band_spatial == pytest.approx(head.band_temporal, abs=1e-5)
        assert 0 < head.rest < 1
