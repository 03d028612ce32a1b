"""Run a model with plugin nodes as TensorRT would: standard nodes by onnx, plugins by their kernels and the manifest.

What a plugin is given is computed by the bundle's own `plugins.py`: shapes of outputs, integers and grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from graphwright.lowering.to_onnx.lower import lower_onnx
from graphwright.lowering.to_tensorrt.bundle import plugins as bundled
from graphwright.lowering.to_tensorrt.compile_entries import compile_plugins
from graphwright.lowering.to_tensorrt.nodes import pass_bytes_as_int8, plugin_translations
from graphwright.lowering.to_tensorrt.plugin import Plugin, Plugins
from graphwright.progress import Progress
from tests.lowering.operator_calls import CALLS, Call

DTYPES = {"FP32": torch.float32, "FP16": torch.float16, "INT8": torch.int8, "INT32": torch.int32, "INT64": torch.int64}
WITH_PLUGINS = (
    "int8_linear",
    "int4_linear",
    "int4_linear rotated",
    "int4_weight_linear",
    "fake_quantize",
    "nm_sparsify",
    "nm_int8_linear",
    "block_sparse_attention",
    "block_sparse_attention_lse",
    "snap_tokens",
    "token_roots",
)
"""Calls of `operator_calls.py`: one of each operator that has plugins, and the rotated one."""
Launch = Callable[[str, int, list[Tensor], list[int], list[Tensor], list[int]], None]
"""(plugin, tactic from 0, inputs, integers, outputs, grid): start the kernel."""


class Lowered(NamedTuple):
    """A model, its plugins, and the manifest's entries of these."""

    model: ir.Model
    plugins: dict[str, Plugin]
    manifest: dict[str, dict[str, Any]]


def lowered(call: Call, folder: Path | None = None, architectures: tuple[int, ...] = ()) -> Lowered:
    """A call for TensorRT; its kernels are compiled into a folder for some architectures, or for none."""
    plugins = Plugins()
    made = lower_onnx(call.program(), target="tensorrt", kept=lambda program: plugin_translations(program, plugins))
    pass_bytes_as_int8(made.model)
    entries = compile_plugins(plugins, architectures, folder or Path(), Progress(False))
    return Lowered(made.model, plugins.by_name, {entry["name"]: entry for entry in entries})


def run_with_plugins(made: Lowered, inputs: Sequence[Tensor], launch: Launch, tactic: int = 0) -> list[Tensor]:
    """What a model gives, every plugin by one of its tactics (its last, if it has less)."""

    def operator(name: str) -> type[OpRun]:
        entry = made.manifest[name]

        def _run(self: Any, *arrays: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
            assert attributes == {"plugin_version": "1", "plugin_namespace": "graphwright"}
            given = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
            assert [x.dtype for x in given] == [DTYPES[kind] for kind in entry["inputs"]]
            shapes = [list(x.shape) for x in given]
            outputs = [
                torch.empty([bundled.evaluate(size, shapes) for size in output["shape"]], dtype=DTYPES[output["type"]])
                for output in entry["outputs"]
            ]
            integers = [bundled.evaluate(integer["value"], shapes) for integer in entry["integers"]]
            number = min(tactic, len(entry["tactics"]) - 1)
            grid = [bundled.evaluate(size, shapes) for size in entry["tactics"][number]["grid"]]
            launch(name, number, given, integers, outputs, [*grid, 1, 1][:3])
            return tuple(x.numpy() for x in outputs)

        return type(name, (OpRun,), {"op_domain": "trt.plugins", "_run": _run})

    proto = ir.serde.serialize_model(made.model)
    evaluator: Any = ReferenceEvaluator(proto, new_ops=[operator(name) for name in made.plugins])
    feed = {item.name: x.numpy() for item, x in zip(proto.graph.input, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(array)) for array in evaluator.run(None, feed)]


def interpreted(names: list[str]) -> list[list[list[Tensor]]]:
    """What calls give by each tactic of their plugins, in Triton's interpreter; for a process that interprets."""
    from graphwright.lowering.to_tensorrt import entries

    results = []
    for name in names:
        made = lowered(CALLS[name])

        def launch(plugin, number, inputs, integers, outputs, grid, made=made):
            found = made.plugins[plugin]
            pairs = zip(inputs, found.inputs, strict=True)
            bytes_too = [x.view(torch.uint8) if tensor.element == "u8" else x for x, tensor in pairs]
            kernel = getattr(entries, found.entry)
            kernel[tuple(grid)](*bytes_too, *integers, *outputs, **dict(found.tactics[number].constants))

        count = max(len(plugin.tactics) for plugin in made.plugins.values())
        inputs = list(CALLS[name].inputs.values())
        results.append([run_with_plugins(made, inputs, launch, tactic) for tactic in range(count)])
    return results
