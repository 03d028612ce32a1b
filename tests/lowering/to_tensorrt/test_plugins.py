"""Plugins compute what their operators compute: kernels in TensorRT's order, in Triton's interpreter."""

from __future__ import annotations

import pytest

from graphwright.lowering.registry import lowerings
from tests.kernels.interpreter import Call as Interpreted
from tests.kernels.interpreter import interpret
from tests.lowering.operator_calls import CALLS
from tests.lowering.to_onnx.run_model import error_of
from tests.lowering.to_tensorrt.run_plugins import WITH_PLUGINS


@pytest.fixture(scope="module")
def results():
    """Call -> what each tactic gives."""
    (made,) = interpret([Interpreted("tests.lowering.to_tensorrt.run_plugins:interpreted", (list(WITH_PLUGINS),))])
    return dict(zip(WITH_PLUGINS, made, strict=True))


@pytest.mark.parametrize("name", WITH_PLUGINS)
def test_every_tactic_computes_what_the_operator_does(results, name):
    call = CALLS[name]
    assert results[name]
    for found in results[name]:
        assert error_of(found, call) <= max(call.tolerance, 1e-5)


def first(operator):
    """What an operator becomes where nothing forbids it."""
    found = lowerings(operator, "tensorrt")
    return found[0].becomes if found else ""


def test_every_operator_with_plugins_is_tried():
    operators = {name.split(",")[0].split(" ")[0] for name in CALLS}
    with_plugins = {name for name in operators if "plugin" in first(name)}
    assert with_plugins == {name.split(" ")[0] for name in WITH_PLUGINS}
