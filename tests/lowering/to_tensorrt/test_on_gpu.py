"""Plugins on a GPU: the bundle's PTX, started by the driver with what the manifest says, as TensorRT starts it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from graphwright.lowering.to_tensorrt.bundle import plugins as bundled
from tests.lowering.operator_calls import CALLS
from tests.lowering.to_onnx.run_model import error_of
from tests.lowering.to_tensorrt.run_plugins import WITH_PLUGINS, lowered, run_with_plugins

MAX_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", WITH_PLUGINS)
def test_every_tactic_computes_what_the_operator_does(name, tmp_path):
    call = CALLS[name]
    made = lowered(call, tmp_path, (80, 89, 90))
    architecture = bundled.choose_architecture(*torch.cuda.get_device_capability(), ["sm_80", "sm_89", "sm_90"])

    def launch(plugin, number, inputs, integers, outputs, grid):
        kernel = made.manifest[plugin]["tactics"][number]["kernels"][architecture]
        given, results = [x.cuda() for x in inputs], [x.cuda() for x in outputs]
        start(tmp_path / kernel["file"], kernel, [*given, *integers, *results], grid)
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)

    for tactic in range(max(len(entry["tactics"]) for entry in made.manifest.values())):
        found = run_with_plugins(made, list(call.inputs.values()), launch, tactic)
        # Products of float32 are three products of tf32 on tensor cores.
        assert error_of(found, call) <= max(call.tolerance, 1e-5)


def start(ptx: Path, kernel: dict, arguments: list, grid: list[int]) -> None:
    """Load a kernel and run it once with these arguments."""
    driver = ctypes.CDLL("libcuda.so.1")

    def check(status: int) -> None:
        assert status == 0, f"the driver answers {status}"

    torch.cuda.synchronize()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver.cuModuleLoadData(ctypes.byref(module), ptx.read_bytes() + b"\0"))
    check(driver.cuModuleGetFunction(ctypes.byref(function), module, kernel["entry"].encode()))
    check(driver.cuFuncSetAttribute(function, MAX_SHARED, kernel["shared_memory"]))
    values = [
        ctypes.c_int32(argument) if isinstance(argument, int) else ctypes.c_uint64(argument.data_ptr())
        for argument in arguments
    ]
    assert len(values) == kernel["parameters"]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    sizes = (*grid, kernel["threads"], 1, 1, kernel["shared_memory"])
    check(driver.cuLaunchKernel(function, *map(ctypes.c_uint, sizes), None, pointers, None))
    check(driver.cuCtxSynchronize())
    check(driver.cuModuleUnload(module))
