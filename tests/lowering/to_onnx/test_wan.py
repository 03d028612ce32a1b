"""The trained Wan with sparse attention: whole samplings driven from ONNX Runtime give the same video."""

from __future__ import annotations

import pytest

import graphwright as gw
from graphwright.quality import psnr
from tests.lowering.to_onnx.programs import node_types, relative
from tests.tiny_wan import captured, sampler

METHODS = {
    # Heads are told apart while it runs, so their recalls are in the graph: no list is a constant.
    "rainfusion": gw.RainFusion(dense_steps=0.2),
    "compact_attention": gw.CompactAttention(dense_steps=0.2, cost=1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_whole_sampling_gives_the_same_video(name, tmp_path):
    program = gw.optimize(captured(), methods=[METHODS[name]], calibration=[sampler], keep="smaller", progress=False)
    assert {"dense", "sparse"} <= set(program.phases)
    path = tmp_path / "wan.onnx"
    files = program.export(path)
    opened = gw.load(path)
    wanted, found = (
        sampler(program.as_module()),
        sampler(lambda **inputs: (opened(**{name: inputs[name] for name in opened.inputs}),)),
    )
    assert relative(found, wanted) < 1e-3
    assert psnr(found, wanted) > 50
    assert sum(file.stat().st_size for file in files) <= 1.02 * program.weight_bytes()
    sparse, dense = (node_types(path.with_name(file)) for file in ("wan.onnx", "wan.dense.onnx"))
    assert (dense["Attention"], sparse["Attention"]) == (4, 2), "two self-attentions became sparse, not the cross ones"
