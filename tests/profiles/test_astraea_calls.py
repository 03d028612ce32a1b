"""Calls of an ASTRAEA program: their order, batches and guidance branches, and its replay in a new process."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidType
from tests.video_models import make

GRID = (2, 4, 4)
TIMESTEPS = [1000.0, 800.0, 600.0, 400.0, 200.0]


@pytest.fixture(scope="module")
def small():
    """A model of one block with random weights: quick to call."""
    model, inputs = make("wan", *GRID)
    denoiser = gw.capture_denoiser(model, inputs, timesteps=TIMESTEPS)
    return model, inputs, gw.optimize(denoiser, methods=[gw.Astraea(table=(10, 5, 5, 3, 5))], progress=False)


def call(program, inputs, timestep):
    return program(**{**inputs, "timestep": torch.tensor([timestep])})


def test_a_run_begins_with_its_first_step(small):
    _, inputs, program = small
    program.reset()
    with pytest.raises(
        InvalidArgument, match=r"timestep 400 builds on the steps before .* begin a run with timestep\[0\] >= 900"
    ):
        call(program, inputs, 400.0)
    call(program, inputs, 1000.0)
    call(program, inputs, 400.0)  # steps may be left out: what is kept is older, and is compared as it is


@pytest.mark.parametrize("timestep", [600.0, 800.0])
def test_a_timestep_that_does_not_fall_is_refused(small, timestep):
    _, inputs, program = small
    call(program, inputs, 1000.0)
    before = call(program, inputs, 600.0)
    state = {name: tensor.clone() for name, tensor in program._state().items()}
    with pytest.raises(InvalidArgument, match=f"timestep {timestep:g} after 600: it must fall from call to call"):
        call(program, inputs, timestep)
    assert all(torch.equal(state[name], tensor) for name, tensor in program._state().items())
    call(program, inputs, 400.0)
    call(program, inputs, 1000.0)  # a new run
    assert torch.equal(call(program, inputs, 600.0), before)


def test_a_batch_or_size_that_changes_is_refused(small):
    _, inputs, program = small
    call(program, inputs, 1000.0)
    doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with pytest.raises(InvalidType, match="dimension 0 is fixed"):
        program(**{**doubled, "timestep": torch.tensor([800.0, 800.0])})
    with pytest.raises(InvalidType, match="is fixed"):
        call(program, make("wan", 2, 4, 6)[1], 800.0)
    call(program, inputs, 800.0)


def test_guidance_branches_of_one_batch_are_kept_apart(small):
    model, inputs, program = small
    other = {**inputs, "encoder_hidden_states": torch.randn(1, 7, 16)}
    both = {name: torch.cat([inputs[name], other[name]]) for name in inputs}
    captured_both = gw.capture_denoiser(model, both, timesteps=TIMESTEPS)
    together = gw.optimize(captured_both, methods=[gw.Astraea(table=(10, 5, 5, 3, 5))], progress=False)
    pair = last = torch.empty(0)
    for timestep in TIMESTEPS:
        pair = together(**{**both, "timestep": torch.tensor([timestep] * 2)})
        torch.testing.assert_close(pair[:1], call(program, inputs, timestep), rtol=1e-4, atol=1e-5)
    call(program, other, 1000.0)
    for timestep in TIMESTEPS[1:]:
        last = call(program, other, timestep)
    torch.testing.assert_close(pair[1:], last, rtol=1e-4, atol=1e-5)


def test_guidance_branches_called_in_turn_need_a_context_each(small):
    """As a diffusers pipeline calls them: inside `cache_context` state is the branch's own."""
    _, inputs, program = small
    module = program.as_module()
    other = {**inputs, "encoder_hidden_states": torch.randn(1, 7, 16)}
    alone = {}
    for name, given in (("cond", inputs), ("uncond", other)):
        alone[name] = [call(program, given, timestep) for timestep in TIMESTEPS]
    for number, timestep in enumerate(TIMESTEPS):
        for name, given in (("cond", inputs), ("uncond", other)):
            with module.cache_context(name):
                (found,) = module(**{**given, "timestep": torch.tensor([timestep])})
            assert torch.equal(found, alone[name][number])
    call(program, inputs, 1000.0)
    call(program, inputs, 800.0)
    with pytest.raises(InvalidArgument, match="each within its own cache_context"):
        call(program, other, 800.0)


def test_a_profile_replays_in_a_new_process_bit_for_bit(small, tmp_path):
    _, inputs, program = small
    program.profile.save(tmp_path / "profile.json")
    program.save(tmp_path / "program.gw")
    code = f"""if True:
        import hashlib, torch, graphwright as gw
        from tests.video_models import make
        model, inputs = make("wan", *{GRID})
        captured = gw.capture_denoiser(model, inputs, timesteps={TIMESTEPS})
        for program in (gw.optimize(captured, profile={str(tmp_path / "profile.json")!r}),
                        gw.load({str(tmp_path / "program.gw")!r})):
            for timestep in {TIMESTEPS}:
                y = program(**{{**inputs, "timestep": torch.tensor([timestep])}})
                print(hashlib.sha256(y.numpy().tobytes()).hexdigest())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [hashlib.sha256(call(program, inputs, t).numpy().tobytes()).hexdigest() for t in TIMESTEPS]
    assert done.stdout.split() == expected * 2
    other = gw.capture_denoiser(*make("wan", 2, 4, 6), timesteps=TIMESTEPS)
    with pytest.raises(gw.GraphwrightError, match="another program"):
        gw.optimize(other, profile=tmp_path / "profile.json", progress=False)
