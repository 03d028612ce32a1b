"""Compact Attention: planted heads are found, search resumes, profiles replay, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.profiles.compact_attention import best_tile
from tests.video_models import FAMILIES, make

GRID = (4, 16, 16)
TILE = (1, 8, 8)


class Planted(nn.Module):
    """Four heads over tokens that carry their coordinates: near in the frame, the same row, the same frame, all."""

    def __init__(self, sharpness: float = 40.0) -> None:
        super().__init__()
        # exp(-|a - b|^2) is a product of what each axis adds to q.k: coordinates on a circle keep norms equal.
        picks = torch.zeros(4, 6)
        picks[0] = torch.tensor([0.0, 0, 1, 1, 1, 1])  # row and column
        picks[1] = torch.tensor([0.0, 0, 1, 1, 0, 0])  # row
        picks[2] = torch.tensor([1.0, 1, 0, 0, 0, 0])  # frame
        self.register_buffer("project", torch.diag_embed(picks * sharpness**0.5).permute(0, 1, 2).contiguous())
        self.value = nn.Linear(6, 4 * 6)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.cat([F.linear(x, weight) for weight in self.project.unbind()], -1)
        query = heads.view(x.shape[0], x.shape[1], 4, 6).transpose(1, 2)
        value = self.value(x).view(x.shape[0], x.shape[1], 4, 6).transpose(1, 2)
        return F.scaled_dot_product_attention(query, query, value)


def coordinates(frames: int, height: int, width: int) -> Tensor:
    """Tokens [1, N, 6]: each coordinate as a point on half a circle."""
    axes = torch.meshgrid(*(torch.arange(size) / size * torch.pi for size in (frames, height, width)), indexing="ij")
    return torch.stack([part for axis in axes for part in (axis.cos(), axis.sin())], -1).reshape(1, -1, 6)


def optimize(model, x, **options):
    method = gw.CompactAttention(**{"dense_steps": 0.0, "tile": TILE, "grid": GRID, "cost": 0.3, **options})
    return gw.optimize(model, (x,), methods=[method], keep="smaller", progress=False)


def kept(program):
    (decision,) = [decision for decision in program.decisions if decision.status == "kept"]
    return decision


def test_planted_heads_are_found():
    torch.manual_seed(0)
    model, x = Planted().eval(), coordinates(*GRID)
    program = optimize(model, x)
    decision = kept(program)
    near, row, frame, everything = decision.figures["shape"]
    assert near.startswith("local")
    assert frame.endswith("varying in time")
    assert everything.startswith("global")
    density = decision.figures["density"]
    assert density[3] == 1.0
    assert density[0] < density[1] < 1
    assert density[2] < 0.8
    assert min(decision.figures["recall"]) > 0.9
    # What the search predicts is what the program keeps: the search reads the very queries and keys.
    assert decision.figures["recall"] == pytest.approx(decision.figures["searched_recall"], abs=2e-3)
    expected = model(x)
    error = torch.linalg.vector_norm(program(x) - expected) / torch.linalg.vector_norm(expected)
    assert error < 0.1
    assert row


def test_recall_one_keeps_everything_that_matters():
    torch.manual_seed(0)
    model, x = Planted().eval(), coordinates(*GRID)
    program = optimize(model, x, recall=1.0)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_lower_recall_is_never_denser():
    torch.manual_seed(0)
    model, x = Planted(8.0).eval(), coordinates(*GRID)
    densities = [sum(kept(optimize(model, x, recall=recall)).figures["density"]) for recall in (0.99, 0.9, 0.7)]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[-1]


@pytest.mark.parametrize("grid", [(3, 12, 20), (4, 9, 16)])
def test_a_grid_that_the_tile_does_not_divide_is_padded_exactly(grid):
    torch.manual_seed(0)
    model, x = Planted().eval(), coordinates(*grid)
    program = optimize(model, x, grid=grid, recall=1.0)
    assert kept(program).options["tile"] == list(TILE)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_a_static_length(family):
    model, inputs = make(family, *GRID)
    captured = gw.capture_denoiser(model, inputs, timesteps=[900, 700, 500, 300])
    method = gw.CompactAttention(dense_steps=0.25, recall=1.0, cost=0.0, bucket=2)
    program = gw.optimize(captured, methods=[method], keep="smaller", progress=False)
    assert list(program.phases) == ["dense", "sparse_1", "sparse_2"]
    kept = {decision.phase for decision in program.decisions if decision.status == "kept"}
    if family == "mochi":
        assert not kept
        assert any("static grid" in d.reason for d in program.decisions)
    else:
        assert kept == {"sparse_1", "sparse_2"}
    for timestep in (900.0, 300.0):
        called = {**inputs, "timestep": torch.tensor([timestep], dtype=inputs["timestep"].dtype)}
        with torch.no_grad():
            expected = model(**called, return_dict=False)[0]
        torch.testing.assert_close(program(**called), expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from graphwright.profiles import compact_attention, offset_mass

    model, inputs = make("wan", *GRID, layers=2)
    captured = gw.capture_denoiser(model, inputs, timesteps=[900, 700, 500, 300])
    calls = [((), {**inputs, "timestep": torch.tensor([t])}) for t in (900.0, 700.0, 500.0, 300.0)]
    method = gw.CompactAttention(dense_steps=0.25, bucket=2, checkpoint=tmp_path / "search")

    def run():
        return gw.optimize(captured, methods=[method], calibration=calls, keep="smaller", progress=False)

    counted, gather = [], offset_mass._gather

    def interrupting(each, query, key):
        counted.append(each.site.id)
        if len(counted) == 5:
            raise KeyboardInterrupt
        return gather(each, query, key)

    monkeypatch.setattr(offset_mass, "_gather", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert list((tmp_path / "search").glob("*.safetensors"))
    first = len(counted)
    resumed = run()
    # Two sites in two phases, one of which has two calls: six gatherings, of which finished runs are not repeated.
    assert len(counted) - first < 6
    monkeypatch.undo()
    fresh = gw.optimize(
        captured, methods=[method.model_copy(update={"checkpoint": None})], calibration=calls, keep="smaller",
        progress=False,
    )  # fmt: skip
    assert [d.options for d in resumed.decisions] == [d.options for d in fresh.decisions]
    assert "checkpoint" not in resumed.profile.methods[0]["options"]
    assert compact_attention.CompactAttention.model_fields["checkpoint"].exclude


_REPLAY = """
import sys, torch, graphwright as gw
from tests.video_models import make
model, inputs = make("wan", 4, 16, 16)
captured = gw.capture_denoiser(model, inputs, timesteps=[900, 700, 500, 300])
program = gw.optimize(captured, profile=sys.argv[1], progress=False)
torch.save(program(**{**inputs, "timestep": torch.tensor([500.0])}), sys.argv[2])
"""


def test_the_profile_replays_bit_for_bit_in_a_new_process(tmp_path):
    model, inputs = make("wan", *GRID)
    captured = gw.capture_denoiser(model, inputs, timesteps=[900, 700, 500, 300])
    method = gw.CompactAttention(dense_steps=0.25, bucket=2, cost=0.9, recall=0.8)
    program = gw.optimize(captured, methods=[method], keep="smaller", progress=False)
    program.profile.save(tmp_path / "profile.json")
    command = [sys.executable, "-c", _REPLAY, str(tmp_path / "profile.json"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    replayed = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(replayed, program(**{**inputs, "timestep": torch.tensor([500.0])}))


def test_a_profile_of_other_heads_leaves_the_site_dense_and_says_so():
    model, x = Planted().eval(), coordinates(*GRID)
    program = optimize(model, x)
    decision = kept(program).model_copy(deep=True)
    decision.options["windows"] = decision.options["windows"][:3]
    profile = program.profile.model_copy(update={"decisions": [decision]})
    replayed = gw.optimize(model, (x,), profile=profile, progress=False)
    (failed,) = replayed.decisions
    assert (failed.status, failed.reason) == ("failed", "windows of 3 heads for an attention of 4")
    torch.testing.assert_close(replayed(x), model(x))


def test_the_search_is_refused_without_calibration_inputs():
    captured = gw.capture(Planted().eval(), (coordinates(*GRID),))
    captured.exported.example_inputs = None
    with pytest.raises(gw.GraphwrightError, match="searches on calibration inputs"):
        gw.optimize(captured, methods=[gw.CompactAttention(grid=GRID, dense_steps=0)], progress=False)


def test_the_tile_pads_least_and_is_most_cubic():
    assert best_tile((8, 16, 16), 64) == (4, 4, 4)
    assert best_tile((21, 48, 80), 128) == (1, 8, 16)
    assert best_tile((1, 16, 16), 64) == (1, 8, 8)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"tile": (6, 8, 8)}, "must hold 64 or 128"), ({"recall": 0.0}, "recall"), ({"cost": -1.0}, "cost"),
     ({"bucket": 0}, "bucket"), ({"family": "triple"}, "family"), ({"stride": 0}, "stride")],
)  # fmt: skip
def test_options_outside_their_range_are_refused(options, named):
    with pytest.raises(gw.GraphwrightError, match=named):
        gw.CompactAttention(**options)


def test_tiles_are_permuted_once_for_all_layers():
    model, inputs = make("wan", *GRID, layers=3)
    captured = gw.capture_denoiser(model, inputs)
    method = gw.CompactAttention(dense_steps=0, bucket=50, recall=1.0, cost=0.0)
    program = gw.optimize(captured, methods=[method], keep="smaller", progress=False)
    (record,) = [record for record in program.history.passes if record.name == "hoist_order"]
    assert record.changed == 4 * 3 - 2
    assert str(record.refusals[0]) == "2 permutations remain of 12"
    assert "2 permutations remain of 12" in str(program.report())
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(program(**inputs), expected, rtol=1e-4, atol=1e-5)
