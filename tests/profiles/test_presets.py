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
    options = method.model_dump(mode="json")
    assert all(options[option] == value for option, value in preset.options.items())
    assert "arXiv" in preset.source
    assert preset.published
    assert preset.verified or preset.reason


def test_the_models_of_the_papers_are_there():
    assert {name.split("/")[0] for name in presets()} >= {
        "wan2.1",
        "hunyuanvideo",
        "cogvideox",
        "llama-3.1-8b",
        "qwen2.5-7b",
    }


def test_an_unknown_preset_is_named_with_those_that_there_are():
    with pytest.raises(gw.GraphwrightError, match="unknown preset 'sora'; there are cogvideox/rainfusion"):
        gw.preset("sora")


def test_published_bits_of_caches_are_what_the_paper_calls_them():
    tables = {name: preset.options["table"] for name, preset in presets().items() if preset.method == "kvtuner"}
    bits = {name: sum(map(sum, table)) / (2 * len(table)) for name, table in tables.items()}
    assert bits["llama-3.1-8b/kvtuner_kivi"] == pytest.approx(3.06, abs=0.005)
    assert bits["qwen2.5-7b/kvtuner"] == 4.0
    assert {name: len(table) for name, table in tables.items() if "llama" in name} == {"llama-3.1-8b/kvtuner_kivi": 32}
