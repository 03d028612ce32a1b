"""Two layers of SmolLM2 as engines: decode, and two phases of dynamic length."""

from __future__ import annotations

from tests.lowering.to_onnx.programs import CACHE, smollm2
from tests.lowering.to_tensorrt_rtx.build_program import built, count


def test_all_phases_are_built_with_the_lengths_of_the_cache(tmp_path):
    phases = built(smollm2(), tmp_path)
    assert {name: count(phase, "attention_input") for name, phase in phases.items()} == {
        "decode": 2,
        "prefill": 2,
        "extend": 2,
    }
    assert phases["decode"]["sizes"] == {}
    for name in ("prefill", "extend"):
        assert phases[name]["sizes"]["input_ids"][-1] == [1, CACHE]
