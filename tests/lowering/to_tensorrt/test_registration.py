"""Plugins register with TensorRT's own Python plugin API, which checks their signatures. Nothing is built here."""

from __future__ import annotations

import json
import shutil

import pytest

from graphwright.lowering.to_tensorrt import write
from tests.lowering.operator_calls import CALLS
from tests.lowering.to_tensorrt.run_plugins import WITH_PLUGINS, lowered
from tests.lowering.to_tensorrt.stub_libraries import missing, run_with_stubs

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"TensorRT's bindings: {missing()}")

REGISTER = """
import json, tensorrt as trt, tensorrt.plugin as trtp
import plugins
from tensorrt.plugin._lib import QDP_REGISTRY
from tensorrt.plugin._tensor import ShapeExprs
names = plugins.register_plugins(".", "sm_90")
flags = list(trt.NetworkDefinitionCreationFlag.__members__)
found = {n: [len(QDP_REGISTRY[n].input_tensor_names), QDP_REGISTRY[n].num_outputs] for n in names}
creators = sorted(f"{c.plugin_namespace}::{c.name}" for c in trt.get_plugin_registry().all_creators)
combinations, launches = {}, {}
for name in names:
    (tried,) = QDP_REGISTRY[name].autotune_func()
    combinations[name] = [[*map(str, made.types), made.tactics] for made in tried._get_combinations()]
    # Shapes that stand for any, which is what TensorRT registers with too: the expressions are made, not evaluated.
    inputs = [trtp.TensorDesc(ShapeExprs(4, _is_dummy=True), trt.float32) for _ in range(found[name][0])]
    outputs = QDP_REGISTRY[name].register_func(*inputs)
    entry, ptx, parameters, integers = QDP_REGISTRY[name].aot_impl_func(*inputs, outputs, 1)
    assert isinstance(parameters, trtp.KernelLaunchParams) and all(isinstance(x, trtp.SymInt32) for x in integers)
    launches[name] = [f".entry {entry}(" in ptx, len(integers), [str(output.dtype) for output in outputs]]
told = {"found": found, "creators": creators, "flags": flags, "combinations": combinations, "launches": launches}
print(json.dumps(told))
"""
TYPES = {"FP32": "DataType.FLOAT", "INT8": "DataType.INT8", "INT32": "DataType.INT32", "INT64": "DataType.INT64"}


def test_every_plugin_registers_with_its_inputs_and_outputs(tmp_path, monkeypatch):
    plugins = {}
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for place, name in enumerate(WITH_PLUGINS):
        for entry in lowered(CALLS[name], kernels, (90,)).manifest.values():
            plugins[f"{entry['name']}_{place}"] = entry | {"name": f"{entry['name']}_{place}"}
    manifest = {"namespace": "graphwright", "plugins": list(plugins.values())}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(write.BUNDLED / "plugins.py", tmp_path)
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    monkeypatch.chdir(tmp_path)
    done = run_with_stubs(REGISTER, stubs)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    sizes = {name: [len(entry["inputs"]), len(entry["outputs"])] for name, entry in plugins.items()}
    assert told["found"] == {f"graphwright::{name}": size for name, size in sizes.items()}
    assert set(told["found"]) <= set(told["creators"])
    assert "PREFER_AOT_PYTHON_PLUGINS" in told["flags"], "build.py asks for it by this name"
    for name, entry in plugins.items():
        types = [TYPES[kind] for kind in (*entry["inputs"], *(output["type"] for output in entry["outputs"]))]
        (combination,) = told["combinations"][f"graphwright::{name}"]
        assert combination == [*types, list(range(1, len(entry["tactics"]) + 1))]
        assert told["launches"][f"graphwright::{name}"] == [True, len(entry["integers"]), types[len(entry["inputs"]) :]]


def test_a_wrong_signature_is_refused(tmp_path):
    code = """
import tensorrt.plugin as trtp, inspect
def describe(x): return x.like()
try: trtp.register("graphwright::wrong")(describe)
except ValueError as error: print(error)
"""
    done = run_with_stubs(code, tmp_path)
    assert "does not have a type annotation" in done.stdout, done.stderr
