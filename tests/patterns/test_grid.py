"""The latent grid of the five video transformer families, proved from their graphs."""

import pytest
import torch

import graphwright as gw
from graphwright.patterns.graph import GraphView
from graphwright.patterns.grid import find_grid
from tests.models import Mlp
from tests.video_models import FAMILIES, GRID, make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_is_proved_and_the_program_is_the_model(family: str) -> None:
    model, inputs = make(family, *GRID)
    captured = gw.capture_denoiser(model, inputs)
    assert captured.facts["grid"] == list(GRID)
    assert captured.facts["timestep"] == "timestep"
    program = gw.optimize(captured)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(program(**inputs), expected, rtol=1e-4, atol=1e-5)
    (sample,) = program.as_module()(**inputs, return_dict=False)
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
    kinds = {site.attention for site in program.sites["main"].attention}
    assert kinds == ({"self", "cross"} if family in ("wan", "ltx") else kinds & {"self", "cross", "joint"})


def test_dynamic_frames_stay_dynamic_in_the_grid() -> None:
    model, inputs = make("wan", *GRID)
    captured = gw.capture_denoiser(model, inputs, dynamic_frames=True)
    assert captured.facts["grid"] == [None, *GRID[1:]]
    program = gw.optimize(captured)
    longer = {**inputs, "hidden_states": torch.randn(1, 4, 5, 8, 12)}
    with torch.no_grad():
        torch.testing.assert_close(program(**longer), model(**longer, return_dict=False)[0], rtol=1e-4, atol=1e-5)


def test_no_evidence_is_no_grid() -> None:
    exported = torch.export.export(Mlp().eval(), (torch.randn(2, 32),)).run_decompositions({})
    assert find_grid(GraphView(exported)) is None


def test_an_unknown_timestep_input_is_named() -> None:
    model, inputs = make("wan", *GRID)
    with pytest.raises(gw.GraphwrightError, match="no input is called 'sigma'; the inputs are hidden_states"):
        gw.capture_denoiser(model, inputs, timestep="sigma")
