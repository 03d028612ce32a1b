"""RainFusion: planted heads get their types, all five families run it, dynamic sizes too, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphwright as gw
from tests.video_models import FAMILIES, make

GRID = (5, 8, 8)
FRAMES, FRAME = GRID[0], GRID[1] * GRID[2]
FULL = {"sparsity": 1e-9, "alpha": 0.0, "dense_steps": 0.0}
"""A band as wide as the map: sparse in form, dense in content."""


class Attention(nn.Module):
    """Three heads of 64 over tokens [1, N, 146] of `planted`: each finds what was planted for it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        query, key, value = torch.zeros(3, 192, 146).unbind()
        query[:64, :64] = key[:64, :64] = 12 * torch.eye(64)  # the same place in all frames
        query[64:128, 64:128] = key[64:128, 64:128] = 12 * torch.eye(64)  # the same frame
        query[128, 128] = key[128, 129] = 12  # one key in two, wherever the query is
        value[:, 130:] = torch.randn(192, 16, generator=generator)
        self.weights = nn.ParameterList([query, key, value])

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            F.linear(x, weight).view(x.shape[0], x.shape[1], 3, 64).transpose(1, 2) for weight in self.weights
        )
        return F.scaled_dot_product_attention(query, key, value)


def planted(frames: int = FRAMES) -> Tensor:
    token = torch.arange(frames * FRAME)
    place, frame = F.one_hot(token % FRAME, 64).float(), F.one_hot(token // FRAME, 64).float()
    sampled = ((token % FRAME) // 8 - token % 8) % 2 == 0
    noise = torch.randn(len(token), 16, generator=torch.Generator().manual_seed(1))
    return torch.cat([place, frame, torch.ones(len(token), 1), sampled[:, None].float(), noise], 1)[None]


def optimize(model, args=(), kwargs=None, *, dynamic_shapes=None, **options):
    method = gw.RainFusion(**{"dense_steps": 0.0, **options})
    return gw.optimize(
        model, args, kwargs, dynamic_shapes=dynamic_shapes, methods=[method], keep="smaller", progress=False
    )


def kept(program):
    return [decision for decision in program.decisions if decision.status == "kept"]


def test_planted_heads_get_their_types_and_lose_nothing():
    model, x = Attention().eval(), planted()
    program = optimize(model, (x,), grid=GRID)
    (decision,) = kept(program)
    assert decision.figures["type"] == ["temporal", "spatial", "textural"]
    assert min(decision.figures["recall"]) > 0.99
    # Of 5 x 5 frames of one block each: the first as row and column, a band of 10 or half of the other 16.
    assert decision.figures["density"] == pytest.approx([19 / 25, 19 / 25, 17 / 25])
    expected, got = model(x), program(x)
    for head in range(3):
        error = torch.linalg.vector_norm(got[:, head] - expected[:, head]) / torch.linalg.vector_norm(expected[:, head])
        assert error < 0.05


def test_types_follow_the_input_in_one_program():
    """Online: tokens that all look alike turn every head into a textural one, item by item of a batch."""
    model, x = Attention().eval(), planted()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = optimize(model, (torch.cat([x, x]),), dynamic_shapes=({0: batch},), grid=GRID)
    alike = x.clone()
    alike[..., :130] = 0
    both = program(torch.cat([x, alike]))
    torch.testing.assert_close(both[:1], program(x))
    torch.testing.assert_close(both[1:], program(alike))
    sampled = ((torch.arange(FRAMES * FRAME) % FRAME) // 8 - torch.arange(FRAMES * FRAME) % 8) % 2 == 0
    values = F.linear(alike, model.weights[2]).view(1, -1, 3, 64).transpose(1, 2)
    seen = sampled.clone()
    seen[:FRAME] = True  # the first frame is protected
    rows = both[1:, :, FRAME:]
    torch.testing.assert_close(rows, values[:, :, seen].mean(2, keepdim=True).expand_as(rows), rtol=1e-4, atol=1e-5)


def test_two_types_only_force_the_better_one():
    types = kept(optimize(Attention().eval(), (planted(),), grid=GRID, textural=False))[0].figures["type"]
    assert types[:2] == ["temporal", "spatial"]
    assert types[2] in ("temporal", "spatial")


def test_adaptive_bandwidth_takes_the_narrowest_that_holds():
    model, x = Attention().eval(), planted()
    (decision,) = kept(optimize(model, (x,), grid=GRID, adaptive_bandwidth=True))
    assert decision.figures["type"][0] == "temporal 1"
    wide = optimize(model, (x,), grid=GRID, sparsity=0.25)
    assert decision.figures["density"][0] < kept(wide)[0].figures["density"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_dense_with_full_lists_and_sparse_with_others(family):
    model, inputs = make(family, *GRID)
    captured = gw.capture_denoiser(model, inputs)
    expected = model(**inputs, return_dict=False)[0]
    full, sparse = (optimize(captured, **options) for options in (FULL, {"alpha": 0.0}))
    torch.testing.assert_close(full(**inputs), expected, rtol=1e-4, atol=1e-5)
    assert kept(sparse)
    assert all(max(d.figures["density"]) < 0.9 for d in kept(sparse))
    assert not torch.allclose(sparse(**inputs), expected, rtol=1e-4, atol=1e-5)
    others = {site.id for site in sparse.sites["sparse"].attention}  # text and cross attention stay SDPA
    assert others.isdisjoint(d.site for d in kept(sparse))


@pytest.mark.parametrize("family", ["wan", "cogvideox", "hunyuan", "mochi"])
def test_dynamic_frames_run_at_other_lengths_and_are_saved(family, tmp_path):
    model, inputs = make(family, *GRID)
    program = optimize(gw.capture_denoiser(model, inputs, dynamic_frames=True), **FULL)
    assert kept(program)
    _, longer = make(family, 7, *GRID[1:])
    with torch.no_grad():
        expected = model(**longer, return_dict=False)[0]
    got = program(**longer)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    program.save(tmp_path / "program.gw")
    assert torch.equal(gw.load(tmp_path / "program.gw")(**longer), got)


def test_the_first_steps_run_dense_also_for_a_guidance_batch():
    model, inputs = make("wan", *GRID)
    inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
    captured = gw.capture_denoiser(model, inputs, timesteps=[1000, 900, 700, 400, 100])
    program = optimize(captured, dense_steps=0.4, alpha=0.0)
    assert list(program.phases) == ["dense", "sparse"]
    for timestep, phase in ((1000.0, "dense"), (900.0, "dense"), (700.0, "sparse"), (0.0, "sparse")):
        called = {**inputs, "timestep": torch.full((2,), timestep)}
        assert program.dispatch(**called)[1] == phase
        with torch.no_grad():
            expected = model(**called, return_dict=False)[0]
        close = torch.allclose(program(**called), expected, rtol=1e-4, atol=1e-5)
        assert close == (phase == "dense")
    reasons = {d.reason for d in program.decisions if d.phase == "dense"}
    assert "steps 0 to 1 run dense" in reasons


def test_version_two_keeps_the_best_blocks():
    model, x, grid = Attention().eval(), planted(34), (34, 8, 8)
    program = optimize(model, (x,), grid=grid, version=2, sparsity=0.75)
    (decision,) = kept(program)
    assert decision.pass_name == "keep_top_blocks"
    # 33 blocks of one frame each behind the first, of which ceil(33 / 4) are kept, and the first frame.
    assert decision.figures["density"][0] == pytest.approx((33 * (9 + 1) + 34) / 34**2, abs=1e-4)
    assert decision.figures["recall"][1] > 0.99  # frames that look at themselves find themselves
    full = optimize(model, (x,), grid=grid, version=2, sparsity=1e-9)
    torch.testing.assert_close(full(x), model(x), rtol=1e-4, atol=1e-5)


def test_sites_that_do_not_qualify_say_why():
    def reason(grid, frames=FRAMES, **options):
        (decision,) = optimize(Attention().eval(), (planted(frames),), grid=grid, **options).decisions
        assert decision.status == "refused"
        return decision.reason

    assert "no grid" in reason(None)
    assert "360 tokens, as the grid asks for" in reason((5, 8, 9))
    assert reason((1, 16, 20)) == "there is one frame only, and the first is protected"
    assert reason((2, 8, 8), 2, block_size=128) == "64 tokens after the first frame are less than a block of 128"
    assert "version 2 starts at 32" in reason(GRID, version=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"sparsity": 0.0}, "sparsity"), ({"sparsity": 1.0}, "sparsity"), ({"alpha": 1.5}, "alpha"),
     ({"version": 3}, "version"), ({"dense_steps": 1.0}, "dense_steps"), ({"block_size": 32}, "block_size")],
)  # fmt: skip
def test_options_outside_their_range_are_refused(options, named):
    with pytest.raises(gw.GraphwrightError, match=named):
        gw.RainFusion(**options)


def test_attention_that_returns_probabilities_is_no_site():
    class Eager(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            shares = (x @ x.mT * 32**-0.5).softmax(-1)
            return shares @ x, shares

    program = optimize(Eager().eval(), (torch.randn(1, 2, FRAMES * FRAME, 32),), grid=GRID)
    assert program.decisions == []
    refusals = program.history.refusals["main"]["attention"]
    assert any("probabilities" in refusal for refusal in refusals), refusals


def test_a_mask_that_differs_between_queries_keeps_the_site_dense():
    class Masked(Attention):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(2)
            self.register_buffer("mask", torch.rand(FRAMES * FRAME, FRAMES * FRAME, generator=generator) > 0.3)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = (
                F.linear(x, weight).view(x.shape[0], x.shape[1], 3, 64).transpose(1, 2) for weight in self.weights
            )
            return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)

    model, x = Masked().eval(), planted()
    (decision,) = (program := optimize(model, (x,), grid=GRID)).decisions
    assert decision.status == "refused"
    assert "the mask is not the same for all queries" in decision.reason
    torch.testing.assert_close(program(x), model(x))


def test_attention_with_dropout_is_refused_when_it_is_captured():
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)

    program = optimize(Dropping().eval(), (torch.randn(1, 2, FRAMES * FRAME, 32),), grid=GRID)
    assert program.decisions == []
    refusals = program.history.refusals["main"]["attention"]
    assert any("dropout" in refusal for refusal in refusals), refusals


def test_a_profile_replays_without_the_method(tmp_path):
    model, inputs = make("wan", *GRID)
    captured = gw.capture_denoiser(model, inputs, timesteps=[1000, 900, 700, 400, 100])
    program = optimize(captured, dense_steps=0.4)
    program.profile.save(tmp_path / "profile.json")
    replayed = gw.optimize(captured, profile=tmp_path / "profile.json")
    assert list(replayed.phases) == ["dense", "sparse"]
    called = {**inputs, "timestep": torch.tensor([100.0])}
    assert torch.equal(replayed(**called), program(**called))
    program.save(tmp_path / "program.gw")
    assert torch.equal(gw.load(tmp_path / "program.gw")(**called), program(**called))


def test_what_is_too_short_or_too_dense_to_gain_stays_dense_and_says_so():
    model, x = Attention().eval(), planted()
    method = gw.RainFusion(dense_steps=0.0, grid=GRID)
    (decision,) = gw.optimize(model, (x,), methods=[method], progress=False).decisions
    assert decision.status == "refused"
    assert decision.reason == "dense attention is faster below 1024 tokens on cpu, this one has 320"
    longer = planted(20)
    method = gw.RainFusion(dense_steps=0.0, grid=(20, 8, 8), sparsity=0.05)
    (decision,) = gw.optimize(model, (longer,), methods=[method], progress=False).decisions
    assert decision.reason.startswith("dense attention is faster from density 0.55 on at 1280 tokens on cpu, got 0.9")
