"""Presets are valid methods with a source, and say what was not run."""

from __future__ import annotations

import pytest

import graphwright as gw
from graphwright.profiles.presets import presets


@pytest.mark.parametrize("name", presets())
def test_every_preset_makes_its_method_and_names_its_source(name):
    preset = presets()[name]
    method = gw.preset(name)
    assert method.name == preset.method
    assert all(getattr(method, option) == value for option, value in preset.options.items())
    assert "arXiv" in preset.source
    assert preset.published
    assert preset.verified or preset.reason


def test_the_models_of_the_papers_are_there():
    assert {name.split("/")[0] for name in presets()} >= {"wan2.1", "hunyuanvideo", "cogvideox"}


def test_an_unknown_preset_is_named_with_those_that_there_are():
    with pytest.raises(gw.GraphwrightError, match="unknown preset 'sora'; there are cogvideox/rainfusion"):
        gw.preset("sora")
