"""One lowered call in ONNX Runtime, and how near it has to be to the operator."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from graphwright.lowering.to_onnx.lower import lower_onnx
from tests.lowering.operator_calls import Call


def run(model: ir.Model, inputs: list[Tensor]) -> list[Tensor]:
    """What ONNX Runtime gives, after the checker and strict shape inference passed."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {item.name: value.numpy() for item, value in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def error_of(found: list[Tensor], call: Call) -> float:
    """The largest error over the largest value; what are no numbers must be so in both, shapes and dtypes alike."""
    worst = 0.0
    for got, wanted in zip(found, call.expected(), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        finite = wanted.isfinite()
        assert torch.equal(got.isfinite(), finite)
        difference = (got.double() - wanted.double())[finite].abs()
        if difference.any():
            worst = max(worst, float(difference.max() / wanted[finite].double().abs().max()))
    return worst


def assert_standard(call: Call) -> None:
    """Assert that a call becomes standard operators that compute the same."""
    lowered = lower_onnx(call.program())
    assert {node.domain for node in lowered.model.graph.all_nodes()} <= {"", "ai.onnx"}
    assert error_of(run(lowered.model, list(call.inputs.values())), call) <= call.tolerance
