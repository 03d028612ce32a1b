"""TimeRipple: dense and constant at its ends, its schedule, its replay, and what is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument
from tests.video_models import FAMILIES, HEAD_DIM, make

GRID = (4, 8, 8)
WHOLE = {"dense_steps": 0.0, "dense_tail": 0.0}


def optimize(model, inputs=None, **options):
    method = gw.TimeRipple(**{**WHOLE, **options})
    captured = model if inputs is None else gw.capture_denoiser(model, inputs)
    return gw.optimize(captured, methods=[method], keep="smaller", progress=False)


def kept(program):
    return [decision for decision in program.decisions if decision.status == "kept"]


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_zero_is_dense_in_every_family(family):
    model, inputs = make(family, *GRID)
    captured = gw.capture_denoiser(model, inputs)
    dense = gw.optimize(captured, progress=False)(**inputs)
    zero = optimize(captured, theta=(0.0, 0.0), granularity="element")
    assert kept(zero)
    assert torch.equal(zero(**inputs), dense)
    # Mochi's length is known when the program runs only, and its grid with it.
    reused = optimize(captured, theta=(0.3, 0.6))
    assert not torch.equal(reused(**inputs), dense)


def test_threshold_infinity_makes_every_cell_constant_and_saves_what_eight_allow():
    model, inputs = make("wan", *GRID)
    for granularity in ("element", "group", "token"):
        program = optimize(model, inputs, theta=(1e30, 1e30), granularity=granularity)
        (decision,) = kept(program)
        assert decision.figures["saving"] == pytest.approx([1 - 1 / 64] * 2, abs=1e-4)
        assert decision.figures["saving_by_group"] == pytest.approx(dict.fromkeys("thw", 1 - 1 / 64), abs=1e-4)
        assert decision.figures["reused_queries"] == pytest.approx(7 / 8)


def test_one_axis_saves_three_quarters_at_most():
    model, inputs = make("wan", *GRID)
    (decision,) = kept(optimize(model, inputs, theta=(1e30, 1e30), axes="t", granularity="element"))
    assert decision.figures["saving"] == pytest.approx([0.75, 0.75])
    (decision,) = kept(optimize(model, inputs, theta=(1e30, 1e30), window=4, granularity="element"))
    assert decision.figures["saving"] == pytest.approx([1 - 1 / 64**2] * 2, abs=1e-4)


def test_one_group_is_forced_alone():
    model, inputs = make("wan", *GRID)
    program = optimize(model, inputs, theta=(1e30, 1e30), axes="t", factors=(1.0, 0.0, 0.0), granularity="element")
    (decision,) = kept(program)
    assert decision.figures["groups"] == ["t", "h", "w"]
    assert decision.figures["saving_by_group"] == {"t": 0.75, "h": 0.0, "w": 0.0}


def test_the_ramp_is_the_papers():
    method = gw.TimeRipple()
    thresholds = method.thresholds(50)
    assert thresholds[:12] == pytest.approx([0.2] * 12)
    assert thresholds[16] == pytest.approx(0.35)
    assert thresholds[21:] == [0.5] * 29
    assert (method.schedule(50).first, method.schedule(50).stop) == (10, 49)
    printed = gw.TimeRipple(literal_eq4=True).thresholds(50)
    assert printed[11] == 0.0
    assert printed[20] == pytest.approx(0.27)
    assert printed[21] == 0.5
    # At half the steps, at the same share of the run.
    assert gw.TimeRipple().thresholds(25)[8] == pytest.approx(method.thresholds(50)[16])


def test_the_first_steps_and_the_last_run_dense():
    model, inputs = make("wan", *GRID)
    captured = gw.capture_denoiser(model, inputs, timesteps=[1000.0 - 20 * step for step in range(50)])
    program = gw.optimize(captured, methods=[gw.TimeRipple(theta=(1e9, 1e9))], keep="smaller", progress=False)
    assert list(program.phases) == ["dense", "sparse", "dense_tail"]
    for step, phase in ((0, "dense"), (9, "dense"), (10, "sparse"), (48, "sparse"), (49, "dense_tail")):
        called = {**inputs, "timestep": torch.tensor([1000.0 - 20 * step])}
        assert program.dispatch(**called)[1] == phase
        with torch.no_grad():
            expected = model(**called, return_dict=False)[0]
        assert torch.allclose(program(**called), expected, rtol=1e-4, atol=1e-5) == (phase != "sparse")
    batch = {name: torch.cat([value, value]) for name, value in inputs.items()}
    guided = optimize(gw.capture_denoiser(model, batch), theta=(0.3, 0.3))
    torch.testing.assert_close(guided(**batch)[:1], optimize(model, inputs, theta=(0.3, 0.3))(**inputs))


def test_a_profile_replays_in_a_new_process_bit_for_bit(tmp_path):
    model, inputs = make("wan", *GRID)
    captured = gw.capture_denoiser(model, inputs, timesteps=[1000, 900, 700, 400, 100])
    program = gw.optimize(captured, methods=[gw.TimeRipple(theta=(0.3, 0.6))], keep="smaller", progress=False)
    program.profile.save(tmp_path / "profile.json")
    program.save(tmp_path / "program.gw")
    code = f"""if True:
        import hashlib, torch, graphwright as gw
        from tests.video_models import make
        model, inputs = make("wan", *{GRID})
        captured = gw.capture_denoiser(model, inputs, timesteps=[1000, 900, 700, 400, 100])
        for program in (gw.optimize(captured, profile={str(tmp_path / "profile.json")!r}),
                        gw.load({str(tmp_path / "program.gw")!r})):
            for timestep in (1000.0, 700.0, 400.0):
                y = program(**{{**inputs, "timestep": torch.tensor([timestep])}})
                print(hashlib.sha256(y.numpy().tobytes()).hexdigest())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [
        hashlib.sha256(program(**{**inputs, "timestep": torch.tensor([t])}).numpy().tobytes()).hexdigest()
        for t in (1000.0, 700.0, 400.0)
    ]
    assert done.stdout.split() == expected * 2


def test_a_profile_of_another_resolution_is_refused(tmp_path):
    model, inputs = make("wan", *GRID)
    program = optimize(model, inputs, theta=(0.3, 0.6))
    program.profile.save(tmp_path / "profile.json")
    other = gw.capture_denoiser(*make("wan", 4, 8, 10))
    with pytest.raises(gw.GraphwrightError, match="another program"):
        gw.optimize(other, profile=tmp_path / "profile.json", progress=False)
    with pytest.raises(gw.GraphwrightError, match="is fixed"):
        program(**make("wan", 4, 8, 10)[1])


@pytest.mark.parametrize(("steps", "dense"), [(1, "0 run dense at the beginning and 1"), (4, "2 run dense .* and 2")])
def test_a_run_of_too_few_steps_is_refused(steps, dense):
    model, inputs = make("wan", *GRID)
    captured = gw.capture_denoiser(model, inputs, timesteps=[1000 - 100 * step for step in range(steps)])
    method = gw.TimeRipple(dense_steps=0.5, dense_tail=0.5)
    with pytest.raises(InvalidArgument, match=f"a run of {steps} steps has none left for TimeRipple: {dense}"):
        gw.optimize(captured, methods=[method], progress=False)


def test_groups_that_are_not_known_are_asked_for():
    model, inputs = make("cogvideox", *GRID)
    (decision,) = optimize(model, inputs, granularity="group").decisions
    assert decision.status == "refused"
    assert "give channels=(t, h, w)" in decision.reason
    channels = (8, 12, HEAD_DIM - 20)
    (decision,) = kept(optimize(model, inputs, granularity="group", channels=channels))
    assert decision.options["groups"] == list(channels)
    (decision,) = optimize(model, inputs, channels=(8, 8, 8)).decisions
    assert decision.reason == f"channels (8, 8, 8) are not the {HEAD_DIM} of a head"


def test_a_saving_needs_calibration_of_a_static_grid():
    model, inputs = make("wan", *GRID)
    captured = gw.capture_denoiser(model, inputs, dynamic_frames=True)
    with pytest.raises(InvalidArgument, match="static grid"):
        optimize(captured, saving=0.5)


def test_dynamic_frames_run_at_other_lengths():
    model, inputs = make("wan", *GRID)
    program = optimize(gw.capture_denoiser(model, inputs, dynamic_frames=True), theta=(0.3, 0.3))
    _, longer = make("wan", 6, *GRID[1:])
    static = optimize(gw.capture_denoiser(model, longer), theta=(0.3, 0.3))
    torch.testing.assert_close(program(**longer), static(**longer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"theta": (0.5, 0.2)}, "theta"), ({"theta": (0.1, float("inf"))}, "theta"), ({"ramp": (20, 20)}, "ramp"),
     ({"window": 1}, "window"), ({"axes": "tt"}, "axes"), ({"granularity": "row"}, "granularity"),
     ({"saving": 1.0}, "saving"), ({"factors": (1.0, -1.0, 1.0)}, "factors"), ({"dense_steps": 1.0}, "dense_steps")],
)  # fmt: skip
def test_options_outside_their_range_are_refused(options, named):
    with pytest.raises(gw.GraphwrightError, match=named):
        gw.TimeRipple(**options)
