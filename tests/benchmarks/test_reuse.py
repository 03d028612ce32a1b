"""The measurements of reuse run and measure what they say, on a video of 256 tokens in a few steps."""

from __future__ import annotations

import pytest
import torch

import graphwright as gw
from graphwright.benchmarks import reuse
from graphwright.benchmarks.timing import one_thread
from graphwright.benchmarks.video import Setting
from tests.tiny_wan import LAYERS, captured


@pytest.fixture(scope="module")
def setting():
    """Two of the eight layers."""
    made = Setting(frames=4, size=32, steps=5, prompts=("bikes",))
    made.__dict__["captured"] = captured(5)
    with one_thread():
        yield made


def test_reuse_and_masking_are_compared_at_one_saving(setting):
    found = reuse.saving_curve(setting, {0.3: 0.2})["30%"]
    assert found["reuse"]["saving"] == pytest.approx(0.3, abs=0.05)
    assert found["mask"]["saving"] == found["reuse"]["saving"]
    assert found["reuse"]["psnr"] > found["mask"]["psnr"]


def test_small_values_are_masked_as_many_as_asked_for(setting):
    method = reuse.MaskLowValues(share=0.25, dense_steps=0.0)
    program = gw.optimize(setting.captured, methods=[method], keep="smaller", progress=False)
    (phase,) = program.phases.values()
    zeroed = []

    class Runner(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if "masked_fill" in str(n.target):
                zeroed.append(float((result == 0).float().mean()))
            return result

    from graphwright.passes.dialects import graph_arguments

    called = {**phase.exported.example_inputs[1]["inputs"], "hidden_states": torch.randn(1, 12, 4, 16, 16)}
    flat = program.dispatch(**called)[2]
    Runner(phase.exported.graph_module).run(*graph_arguments(phase.exported, flat), enable_io_processing=False)
    assert zeroed == pytest.approx([0.25] * 2 * LAYERS, abs=0.01)


def test_collapsed_attention_is_timed_against_what_is_left():
    (row,) = reuse.collapse(256, (0.5,), rounds=1)
    assert row["left"] == 0.25
    assert row["of ideal"] == pytest.approx(row["time"] / 0.25)


def test_tables_of_equal_total_are_compared(setting):
    table = reuse.skipped_table(5, 30)
    assert table == (10, 0, 10, 0, 10)
    assert sum(reuse.skipped_table(30, 149)) == 149
    assert sum(reuse.skipped_table(7, 12)) == 12
    found = reuse.budgets(setting, (10, 5, 5, 5, 5))
    assert set(found) >= {"searched", "uniform", "steps skipped", "fixed tokens", "queries and keys"}
    assert found["searched"]["psnr"] == found["uniform"]["psnr"]
    assert found["searched"]["psnr"] > found["queries and keys"]["psnr"]


def test_the_search_is_compared_with_chance(setting):
    size = {"parents": 2, "children": 2, "generations": 2}
    (row,) = reuse.against_random(setting, (0,), 0.6, **size)
    assert row["evaluations"] == 6
    assert row["search"] > 0
    assert row["search"] <= row["uniform"]
