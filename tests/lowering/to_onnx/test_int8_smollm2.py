"""SmolLM2 with int8 linears: integer products in the model, and the same logits, for every choice of operators."""

from __future__ import annotations

import pytest

import graphwright as gw
from tests.lowering.to_onnx.programs import assert_exported, smollm2


@pytest.fixture(scope="module")
def program():
    return smollm2((gw.Int8(),))


# Four stacked linears a layer; sums are exact, and the order of float32 products is the same.
@pytest.mark.parametrize(
    ("ops", "node", "tolerance"),
    [("portable", "MatMulInteger", 1e-5), ("ort", "MatMulIntegerToFloat", 1e-5), ("function", "int8_linear", 1e-5)],
)
def test_linears_stay_integer_and_logits_are_the_same(program, ops, node, tolerance, tmp_path):
    assert_exported(program, ops, {node: 8}, tolerance, tmp_path)
