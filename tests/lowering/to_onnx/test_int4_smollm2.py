"""SmolLM2 with 4-bit weights and float activations: 4 bits in the file, and the same tokens, for every choice."""

from __future__ import annotations

import pytest

import graphwright as gw
from tests.lowering.to_onnx.programs import assert_exported, by_reference, smollm2


@pytest.fixture(scope="module")
def program():
    return smollm2((gw.DartQuant(weights="rtn", rotate="never", activation_bits=16),))


# Activations are floats in all three: only the order of sums differs from the formula. The program's own kernel rounds
# them to bfloat16.
@pytest.mark.parametrize(
    ("ops", "nodes"),
    [("portable", {"DequantizeLinear": 8}), ("ort", {"MatMulNBits": 8}), ("function", {"int4_weight_linear": 8})],
)
def test_weights_stay_4_bits_and_tokens_are_the_same(program, ops, nodes, tmp_path):
    assert_exported(program, ops, nodes, 1e-5, tmp_path, by_reference(program, "int4_weight_linear"))
