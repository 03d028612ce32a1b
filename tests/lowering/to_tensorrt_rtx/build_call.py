"""One lowered call as an engine, and in ONNX Runtime: what TensorRT-RTX computes only a GPU of its own can show."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphwright.lowering.engine_sizes import profile
from graphwright.lowering.to_onnx.lower import lower_onnx
from graphwright.lowering.to_onnx.models import write_models
from graphwright.progress import Progress
from tests.lowering.operator_calls import Call
from tests.lowering.to_onnx.run_model import error_of, run


def assert_builds(call: Call, folder: Path) -> None:
    """Assert that a call becomes an engine, dynamic sizes included, of a model that computes the same."""
    pytest.importorskip("tensorrt_rtx")
    from graphwright.lowering.to_tensorrt_rtx.engine import build_engine

    program = call.program()
    lowered = lower_onnx(program, target="tensorrt_rtx")
    assert error_of(run(lowered.model, list(call.inputs.values())), call) <= max(call.tolerance, 1e-6)
    names = dict(zip(lowered.interface.inputs, call.inputs, strict=True))
    sizes = {
        name: {
            place: (2, size, 2 * size) for place in call.dynamic.get(given, ()) if (size := _size(call, given, place))
        }
        for name, given in names.items()
    }
    write_models({"call.onnx": lowered.model}, folder, "weights")
    shapes = profile(program, sizes)
    assert set(shapes) == {name for name, given in names.items() if call.dynamic.get(given)}
    engine = build_engine(folder / "call.onnx", shapes, ["sm_89", "sm_120"], False, Progress(False))
    assert engine.content.nbytes > 1000
    assert engine.layers


def _size(call: Call, name: str, place: int) -> int:
    return call.inputs[name].shape[place]
