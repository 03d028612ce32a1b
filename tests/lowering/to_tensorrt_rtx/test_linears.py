"""Engines of linears: quantized weights stay in 8 or 4 bits."""

from __future__ import annotations

import pytest
import torch

from graphwright.lowering.registry import choose, name_of, refusal
from graphwright.lowering.to_onnx.lower import lower_onnx
from graphwright.lowering.to_onnx.models import write_models
from graphwright.progress import Progress
from tests.lowering.operator_calls import LINEAR, TOKENS, Call, int4, int4_plain, int8, normal, ops
from tests.lowering.to_tensorrt_rtx.build_call import assert_builds

TAKEN = [name for name in LINEAR if refusal(name.split(" ")[0], "tensorrt_rtx") is None]


@pytest.mark.parametrize("name", TAKEN)
def test_an_engine_is_built(name, tmp_path):
    assert_builds(LINEAR[name], tmp_path)


def test_quantized_weights_stay_small(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from graphwright.lowering.to_tensorrt_rtx.engine import build_engine

    n, k = 512, 1024
    x = {"x": normal(2, 4, k)}
    calls = (
        Call(torch.nn.functional.linear, {"input": x["x"]}, {"weight": normal(n, k)}),
        Call(ops.int8_linear, x, int8(n, k)),
        Call(lambda **a: ops.int4_linear(**a, bits=8), x, int4(n, k)),
        Call(ops.int4_weight_linear, x, int4_plain(n, k)),
    )
    found = []
    for call in calls:
        write_models({"m.onnx": lower_onnx(call.program(), target="tensorrt_rtx").model}, tmp_path, "weights")
        found.append(build_engine(tmp_path / "m.onnx", {}, ["sm_89"], False, Progress(False)).content.nbytes)
    # In bits a weight: a scale for each 32 weights of 4 bits adds one, and the engine itself takes up to four.
    floats, int8_bits, int4_bits, weight_bits = (size * 8 / (n * k) for size in found)
    assert floats > 32
    assert 8 < int8_bits < 12.5
    assert 4 < int4_bits < 9.5
    assert 5 < weight_bits < 7.5


@pytest.mark.parametrize("name", ["int8_linear", "int4_linear", "int4_weight_linear", "nm_int8_linear"])
def test_a_weight_that_is_computed_is_refused(name):
    call = LINEAR[name]
    inputs = {**call.inputs, "weight": call.stored["weight"]}
    stored = {key: value for key, value in call.stored.items() if key != "weight"}
    program = Call(lambda weight, **a: call.call(weight=weight.clone(), **a), inputs, stored, TOKENS).program()
    (node,) = [node for node in program.graph.nodes if name_of(node)]
    choice = choose(node, "tensorrt_rtx")
    assert choice.lowering is None
    assert "its weight is computed by clone, not stored" in choice.reason
