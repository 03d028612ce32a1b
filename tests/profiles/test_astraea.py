"""ASTRAEA on a trained model: exact at its ends, its phases, orderings and search, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument
from graphwright.quality import psnr
from tests.tiny_wan import LAYERS, STEPS, captured, sampler
from tests.video_models import make

HALF = (10, 5, 5, 5, 5, 5)
GRID = (2, 4, 4)
TIMESTEPS = [1000.0, 800.0, 600.0, 400.0, 200.0]


@pytest.fixture(scope="module")
def dense():
    return gw.optimize(captured(), progress=False)


@pytest.fixture(scope="module")
def reference(dense):
    return sampler(dense, seed=0)


def optimize(table, **options):
    return gw.optimize(captured(), methods=[gw.Astraea(table=table, **options)], progress=False)


def test_full_budget_is_bit_equal(reference):
    program = optimize((10,) * STEPS)
    assert torch.equal(sampler(program, seed=0), reference)
    assert torch.equal(sampler(program, seed=0), reference)  # the state of one run does not reach the next
    assert {d.status for d in program.decisions} == {"kept"}
    assert len(program.decisions) == 2 * LAYERS


def test_steps_of_one_budget_share_a_phase():
    program = optimize((10, 5, 0, 5, 10, 0))
    assert list(program.phases) == ["dense", "sparse_1", "sparse_2", "sparse_3"]
    timesteps = captured().facts["timesteps"]
    taken = []
    for timestep in timesteps:
        inputs = program.phases["dense"].exported.example_inputs[1]["inputs"]
        taken.append(program.dispatch(**{**inputs, "timestep": torch.tensor([timestep])})[1])
    assert taken == ["dense", "sparse_1", "sparse_2", "sparse_1", "sparse_3", "sparse_2"]
    calls = {
        name: len([n for n in p.exported.graph.nodes if n.op == "call_function"]) for name, p in program.phases.items()
    }
    assert calls["sparse_2"] < 10  # nothing is computed
    assert calls["sparse_1"] > calls["dense"]


def test_a_step_without_budget_returns_the_output_of_the_step_before():
    program = optimize((10, 0, 5, 0, 0, 5))
    outputs = []

    def recording(**called):
        outputs.append(program(**called))
        return outputs[-1]

    sampler(recording)
    same = [torch.equal(a, b) for a, b in pairwise(outputs)]
    assert same == [True, False, True, True, False]


def test_the_papers_orderings(reference):
    """Scores beat a fixed set of tokens, and all keys beat those of the selected tokens."""
    found = {
        name: psnr(reference, sampler(optimize(HALF, **options), seed=0))
        for name, options in {
            "scores": {}, "residual": {"residual": True}, "fixed": {"tokens": "fixed"}, "keys": {"keys": "selected"}
        }.items()
    }  # fmt: skip
    assert found["scores"] > found["fixed"] + 1
    assert found["scores"] > found["keys"] + 1
    assert found["residual"] > 30
    more = psnr(reference, sampler(optimize((10, 8, 8, 8, 8, 8)), seed=0))
    assert more > found["scores"]


def test_state_is_a_tensor_of_tokens_a_block_and_weights_are_shared(dense):
    program = optimize(HALF)
    tokens, width, size = 256, 256, 4
    each, small = tokens * width * size, 2 * tokens * size
    returned = 12 * 4 * 16 * 16 * size
    assert program.state_bytes() == (LAYERS + 1) * each + LAYERS * small + returned
    assert dense.state_bytes() == 0
    assert program.weight_bytes() == dense.weight_bytes()


# ---- search


def test_the_search_finds_a_table_within_its_budget(reference, tmp_path):
    options = {"budget": 0.6, "parents": 2, "children": 2, "generations": 2, "study": tmp_path / "study.log"}
    program = gw.optimize(captured(), methods=[gw.Astraea(**options)], calibration=[sampler], progress=False)
    (recorded,) = program.profile.methods
    table = recorded["options"]["table"]
    assert table[0] == 10
    assert len(table) == STEPS
    assert 0.9 * 0.6 * 60 - 1 <= sum(table) <= 0.6 * 60
    assert program.profile.measured["astraea"]["table"] == table
    assert program.history.measured["video"][0]["psnr"] > 20
    # Not worse than the uniform table on what it was searched on: that one is among the first.
    uniform = gw.optimize(captured(), methods=[gw.Astraea(budget=0.6, plan="uniform")], progress=False)
    dense = sampler(gw.optimize(captured(), progress=False))
    assert psnr(dense, sampler(program)) >= psnr(dense, sampler(uniform))
    again = gw.optimize(captured(), methods=[gw.Astraea(**options)], calibration=[sampler], progress=False)
    assert again.profile.methods[0]["options"]["table"] == table


def test_a_search_needs_samplers():
    with pytest.raises(InvalidArgument, match="needs samplers as calibration"):
        gw.optimize(captured(), methods=[gw.Astraea()], progress=False)


# ---- refusals


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan", "mochi"])
def test_models_of_two_streams_have_no_block(family):
    model, inputs = make(family, *GRID)
    captured = gw.capture_denoiser(model, inputs, timesteps=TIMESTEPS)
    program = gw.optimize(captured, methods=[gw.Astraea(plan="uniform")], progress=False)
    assert all(decision.status != "kept" for decision in program.decisions)
    assert program.history.refusals["sparse_1"]["block"]


def test_ltx_runs_it():
    model, inputs = make("ltx", *GRID)
    captured = gw.capture_denoiser(model, inputs, timesteps=TIMESTEPS)
    program = gw.optimize(captured, methods=[gw.Astraea(plan="uniform", budget=0.6)], progress=False)
    assert {decision.status for decision in program.decisions} == {"kept"}
    first = {**inputs, "timestep": torch.tensor([1000])}
    with torch.no_grad():
        expected = model(**first, return_dict=False)[0]
    torch.testing.assert_close(program(**first), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "named"),
    [
        ([gw.RainFusion(dense_steps=0.4), gw.Astraea(table=HALF)], "astraea and rainfusion"),
        ([gw.Astraea(table=HALF), gw.TimeRipple(theta=(0.1, 0.2))], "astraea and timeripple"),
        ([gw.Int8(), gw.Astraea(table=HALF)], "astraea and int8"),
    ],
)
def test_what_rewrites_inside_a_block_does_not_go_with_it(methods, named):
    with pytest.raises(InvalidArgument, match=f"{named} would both rewrite .* choose one of them"):
        gw.optimize(captured(), methods=methods, calibration=[sampler], keep="smaller", progress=False)


def test_runs_that_are_too_short_or_not_the_tables_are_refused():
    model, inputs = make("wan", *GRID)
    one = gw.capture_denoiser(model, inputs, timesteps=[1000.0])
    with pytest.raises(InvalidArgument, match="a run of 1 step has none that could build on another"):
        gw.optimize(one, methods=[gw.Astraea(plan="uniform")], progress=False)
    two = gw.capture_denoiser(model, inputs, timesteps=[1000.0, 500.0])
    with pytest.raises(InvalidArgument, match="less than the first step"):
        gw.optimize(two, methods=[gw.Astraea(budget=0.3)], calibration=[lambda denoise: None], progress=False)
    five = gw.capture_denoiser(model, inputs, timesteps=TIMESTEPS)
    with pytest.raises(InvalidArgument, match="a table of 6 steps for a run of 5"):
        gw.optimize(five, methods=[gw.Astraea(table=HALF)], progress=False)


def test_what_is_no_denoiser_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    with pytest.raises(InvalidArgument, match="use capture_denoiser"):
        gw.optimize(model, (torch.randn(1, 4),), methods=[gw.Astraea(plan="uniform")], progress=False)


def test_a_budget_of_quality_is_the_searchs_own():
    with pytest.raises(InvalidArgument, match="set the budget of astraea itself"):
        gw.optimize(captured(), methods=[gw.Astraea(table=HALF)], budget=gw.Budget(max_error=0.1), progress=False)


def test_a_block_that_is_not_static_refuses_all():
    model, inputs = make("wan", *GRID)
    dynamic = gw.capture_denoiser(model, inputs, timesteps=TIMESTEPS, dynamic_frames=True)
    program = gw.optimize(dynamic, methods=[gw.Astraea(plan="uniform")], progress=False)
    assert {d.status for d in program.decisions} == {"refused"}
    assert all("batch or tokens are dynamic" in d.reason for d in program.decisions)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(program(**inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"budget": 0.0}, "budget"), ({"budget": 1.5}, "budget"), ({"table": (5, 5)}, "table"), ({"table": ()}, "table"),
     ({"table": (10, 11)}, "table"), ({"slack": (1.1, 0.9)}, "slack"), ({"penalty": -1.0}, "penalty"),
     ({"plan": "greedy"}, "plan"), ({"parents": 1}, "parents")],
)  # fmt: skip
def test_options_outside_their_range_are_refused(options, named):
    with pytest.raises(gw.GraphwrightError, match=named):
        gw.Astraea(**options)
