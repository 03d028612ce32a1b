"""Registers the plugins of manifest.json with TensorRT: quick plugins whose kernels are PTX, compiled ahead of time.

    import plugins
    plugins.register_plugins(folder, "sm_90")

A plugin passes its inputs, then integers computed from their shapes, then its outputs. TensorRT times the tactics of
each plugin when it builds an engine, and keeps the kernel of the fastest in it: engines need neither this file nor
Python.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any


def register_plugins(folder: str | Path, architecture: str) -> list[str]:
    """Register all plugins.

    Args:
        folder: Where manifest.json and kernels/ lie.
        architecture: Which of the kernels to take, such as "sm_90".

    Returns:
        The plugins' names, with their namespace.
    """
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return [_register(f"{manifest['namespace']}::{p['name']}", p, folder, architecture) for p in manifest["plugins"]]


def choose_architecture(major: int, minor: int, offered: list[str]) -> str:
    """The kernels for a device: PTX of sm_90 is for Hopper alone, any other runs on later devices too."""
    numbers = [int(name.removeprefix("sm_")) for name in offered]
    device = 10 * major + minor
    fitting = [number for number in numbers if number <= device and (number != 90 or major == 9)]
    if not fitting:
        raise SystemExit(f"a device of capability {major}.{minor}; there are kernels for {', '.join(offered)}")
    return f"sm_{max(fitting)}"


def evaluate(expression: Any, shapes: Any) -> Any:
    """A size: a number, or an expression over the inputs' shapes, whose elements may be numbers or symbols."""
    if isinstance(expression, int):
        return expression
    kind, *operands = expression
    if kind == "size":
        return shapes[operands[0]][operands[1]]
    if kind == "numel":
        first, *others = shapes[operands[0]]
        for size in others:
            first = first * size
        return first
    a, b = (evaluate(operand, shapes) for operand in operands)
    if kind == "*":
        return a * b
    if kind == "//":
        return a // b
    if isinstance(a, int):
        return -(-a // b)
    import tensorrt.plugin as trtp

    return trtp.cdiv(a, b)


def _register(identifier: str, plugin: dict[str, Any], folder: Path, architecture: str) -> str:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    kinds = {
        "FP32": trt.float32,
        "FP16": trt.float16,
        "BF16": trt.bfloat16,
        "INT8": trt.int8,
        "INT32": trt.int32,
        "INT64": trt.int64,
    }
    count = len(plugin["inputs"])

    def describe(*inputs: Any) -> Any:
        shapes = [x.shape_expr for x in inputs]
        return tuple(
            trtp.from_shape_expr(tuple(evaluate(size, shapes) for size in output["shape"]), kinds[output["type"]])
            for output in plugin["outputs"]
        )

    def autotune(*tensors: Any) -> Any:
        types = ", ".join([*plugin["inputs"], *(output["type"] for output in plugin["outputs"])])
        return [trtp.AutoTuneCombination(types, "LINEAR", list(range(1, len(plugin["tactics"]) + 1)))]

    def launch(*arguments: Any) -> Any:
        shapes = [x.shape_expr for x in arguments[:count]]
        # A build without custom tactics would ask for tactic 0.
        tactic = plugin["tactics"][max(int(arguments[-1]) - 1, 0)]
        kernel = tactic["kernels"][architecture]
        grid = [evaluate(size, shapes) for size in tactic["grid"]]
        parameters = trtp.KernelLaunchParams(*grid, *[1] * (3 - len(grid)), kernel["threads"])
        parameters.shared_mem = kernel["shared_memory"]
        integers = trtp.SymIntExprs(len(plugin["integers"]))
        for place, integer in enumerate(plugin["integers"]):
            integers[place] = trtp.SymInt32(evaluate(integer["value"], shapes))
        ptx = (folder / "kernels" / kernel["file"]).read_text(encoding="utf-8")
        return kernel["entry"], ptx, parameters, integers

    names = [f"x{place}" for place in range(count)]
    outputs = tuple[(trtp.TensorDesc,) * len(plugin["outputs"])]
    _give_signature(describe, dict.fromkeys(names, trtp.TensorDesc), outputs)
    _give_signature(
        autotune, dict.fromkeys([*names, "outputs"], inspect.Parameter.empty), list[trtp.AutoTuneCombination]
    )
    _give_signature(
        launch,
        dict.fromkeys([*names, "outputs", "tactic"], inspect.Parameter.empty),
        tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs],
    )
    trtp.register(identifier)(describe)
    trtp.autotune(identifier)(autotune)
    trtp.aot_impl(identifier)(launch)
    return identifier


def _give_signature(function: Any, parameters: dict[str, Any], returned: Any) -> None:
    """TensorRT reads a plugin's tensors off the signatures of its functions."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(given, return_annotation=returned)
