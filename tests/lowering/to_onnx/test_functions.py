"""Operators as nodes of graphwright's domain, with functions of the model for bodies."""

from __future__ import annotations

import pytest

from graphwright.lowering.to_onnx.functions import DOMAIN
from graphwright.lowering.to_onnx.lower import lower_onnx
from tests.lowering.operator_calls import CALLS
from tests.lowering.to_onnx.run_model import error_of, run

SOME = ["int8_linear", "int4_linear", "int4_linear rotated", "int4_weight_linear", "nm_linear", "attention_lse",
        "block_sparse_attention in an order", "snap_tokens", "cache_append, a piece"]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_any_runtime_runs_the_body(name):
    call = CALLS[name]
    lowered = lower_onnx(call.program(), ops="function")
    (node,) = lowered.model.graph
    assert (node.domain, node.op_type) == (DOMAIN, name.split(",")[0].split(" ")[0])
    assert [key[:2] for key in lowered.model.functions] == [(DOMAIN, node.op_type)]
    assert error_of(run(lowered.model, list(call.inputs.values())), call) <= call.tolerance


def test_what_is_known_at_run_time_only_is_no_attribute():
    lowered = lower_onnx(CALLS["token_order raster"].program(), ops="function")
    assert not lowered.model.functions
    (choice,) = lowered.choices
    assert choice.passed_over == (("graphwright::token_order", "its frames is known when it runs only"),)
