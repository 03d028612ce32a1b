"""Operators of linears as standard operators, in ONNX Runtime."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional

from graphwright.kernels.int4_weights import dequantized, quantize_groups
from graphwright.lowering.to_onnx.lower import lower_onnx
from graphwright.lowering.to_onnx.quantized import INT4
from tests.lowering.operator_calls import LINEAR, normal
from tests.lowering.to_onnx.run_model import assert_standard, error_of, run


@pytest.mark.parametrize("name", LINEAR)
def test_standard_operators_compute_the_same(name):
    assert_standard(LINEAR[name])


@pytest.mark.parametrize("name", ["int4_linear", "int4_weight_linear"])
def test_onnx_runtime_has_an_operator_of_its_own(name):
    call = LINEAR[name]
    lowered = lower_onnx(call.program(), ops="ort")
    assert [node.op_type for node in lowered.model.graph if node.domain == "com.microsoft"] == ["MatMulNBits"]
    # It rounds tokens to 8 bits in blocks and clips none, so it is nearer to the float product than the operator is.
    float_product = functional.linear(call.inputs["x"], weight_of(name), call.stored.get("bias"))
    (operator,), (found,) = call.expected(), run(lowered.model, list(call.inputs.values()))
    rounding = call.tolerance * float(float_product.abs().max())
    assert float((found - float_product).norm()) <= float((operator - float_product).norm()) + rounding


def weight_of(name: str) -> Tensor:
    """What the call's stored weight stands for, float32 [N, K]."""
    return dequantized(quantize_groups(normal(40, 96, seed=1), 32))


def test_int8_products_are_scaled_as_they_are_written():
    call = LINEAR["int8_linear"]
    lowered = lower_onnx(call.program(), ops="ort")
    assert [node.op_type for node in lowered.model.graph if node.domain] == ["MatMulIntegerToFloat"]
    assert error_of(run(lowered.model, list(call.inputs.values())), call) <= call.tolerance


def test_what_onnx_runtime_cannot_say_falls_back_with_the_reason():
    (choice,) = lower_onnx(LINEAR["int4_linear rotated"].program(), ops="ort").choices
    assert choice.lowering.becomes == "MatMulInteger of a 4-bit weight"
    assert choice.passed_over == ((INT4, "MatMulNBits rounds tokens to 8 bits, this call to 4"),)
