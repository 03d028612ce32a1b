"""Every operator in ATen alone, run as such: what AOTInductor compiles computes what the operator does."""

from __future__ import annotations

import pytest

from graphwright.lowering.to_aoti.write import lower_aoti
from tests.lowering.operator_calls import CALLS
from tests.lowering.to_onnx.run_model import error_of


@pytest.mark.parametrize("name", CALLS)
def test_its_formula_computes_the_same(name):
    call = CALLS[name]
    program, _ = lower_aoti(call.program())
    namespaces = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert namespaces <= {"aten", "prim"}
    assert error_of(list(program.module()(*call.inputs.values())), call) <= call.tolerance
