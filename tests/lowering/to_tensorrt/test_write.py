"""The bundle: what is in it, that its kernels take what its plugins pass, and that it needs nothing of graphwright."""

from __future__ import annotations

import ast
import json
import zipfile

import onnx
import pytest
import torch
from torch.export import Dim

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidFile, MissingExtra, UnsupportedLowering
from graphwright.export import dry_run
from graphwright.lowering import targets
from graphwright.lowering.to_tensorrt import write
from graphwright.lowering.to_tensorrt.bundle import plugins as bundled
from tests.lowering.to_tensorrt.ptx import entry_parameters, kernels_of
from tests.models import Mlp, captured_llama

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program():
    return gw.optimize(captured_llama(), methods=[gw.Int8()], keep="smaller", progress=False)


@pytest.fixture(scope="module")
def bundle(program, tmp_path_factory):
    """Where a program's bundle was unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    (path,) = program.export(folder / "llama.zip", sizes={"input_ids": {1: (2, 8, 32)}})
    assert [file.name for file in folder.iterdir()] == ["llama.zip"]
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def manifest(bundle):
    return json.loads((bundle / "manifest.json").read_text())


def test_the_files(bundle, manifest):
    names = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    models = {"llama.onnx", "llama.decode.onnx", "llama.prefill.onnx", "llama.onnx.data"}
    kernels = {f"kernels/{kernel['file']}" for kernel in kernels_of(manifest)}
    assert names == {*models, *kernels, "manifest.json", "plugins.py", "build.py", "README.md"}
    phases = {phase["plan"]["name"]: phase for phase in manifest["phases"]}
    assert {name: phase["file"] for name, phase in phases.items()} == {
        "decode": "llama.decode.onnx",
        "prefill": "llama.prefill.onnx",
        "extend": "llama.onnx",
    }
    assert phases["extend"]["sizes"]["input_ids"] == [[1, 2], [1, 8], [1, 32]]
    assert phases["decode"]["inputs"][:3] == ["input_ids", "cache_position", "past.key_cache_0"]


def test_models_call_the_plugins_of_the_manifest(bundle, manifest):
    known = {plugin["name"]: plugin for plugin in manifest["plugins"]}
    for phase in manifest["phases"]:
        model = onnx.load(bundle / phase["file"])
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        nodes = [node for node in model.graph.node if node.domain == "trt.plugins"]
        # Of seven linears a layer three and two read the same tokens; the four products have a plugin each by size.
        assert sum(node.op_type.startswith("quantize_tokens") for node in nodes) == 8
        assert sum(node.op_type.startswith("int8_product") for node in nodes) == 8
        for node in nodes:
            plugin = known[node.op_type]
            assert len(node.input) == len(plugin["inputs"])
            assert len(node.output) == len(plugin["outputs"])
            attributes = {attribute.name: attribute.s for attribute in node.attribute}
            assert attributes == {"plugin_version": b"1", "plugin_namespace": manifest["namespace"].encode()}
            for name, kind in zip(node.input, plugin["inputs"], strict=True):
                if name in stored:
                    assert onnx.TensorProto.DataType.Name(stored[name].data_type) == {"FP32": "FLOAT"}.get(kind, kind)


KINDS = {"inputs": ".u64", "integers": ".u32", "outputs": ".u64"}
"""What is passed, in this order -> its type in PTX."""


def test_kernels_take_what_plugins_pass(bundle, manifest):
    assert len(kernels_of(manifest)) > 20
    for plugin in manifest["plugins"]:
        passed = [kind for part, kind in KINDS.items() for _ in plugin[part]]
        for tactic in plugin["tactics"]:
            assert list(tactic["kernels"]) == ["sm_80", "sm_89", "sm_90"]
            for architecture, kernel in tactic["kernels"].items():
                ptx = (bundle / "kernels" / kernel["file"]).read_text()
                taken = entry_parameters(ptx, kernel["entry"])
                assert [parameter.split()[1] for parameter in taken] == passed
                assert kernel["parameters"] == len(passed)
                assert f".target {architecture}" in ptx


def test_nothing_in_it_needs_graphwright(bundle):
    for name in ("plugins.py", "build.py"):
        tree = ast.parse((bundle / name).read_text())
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        allowed = {"__future__", "argparse", "ctypes", "inspect", "json", "pathlib", "plugins", "tensorrt", "typing"}
        assert {name.split(".")[0] for name in modules} <= allowed


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_89"),
        ((12, 0), "sm_89"),
    ],
)
def test_the_kernels_for_a_device(device, chosen):
    # PTX of sm_90 uses what only Hopper has: its target is sm_90a.
    assert bundled.choose_architecture(*device, ["sm_80", "sm_89", "sm_90"]) == chosen


def test_an_old_device_is_refused():
    with pytest.raises(SystemExit, match=r"a device of capability 7.5; there are kernels for sm_80, sm_90"):
        bundled.choose_architecture(7, 5, ["sm_80", "sm_90"])


def test_a_dry_run_names_the_plugins(program):
    rows = dry_run(program, "llama.zip").to_json()["phases"]["decode"]
    assert [row["becomes"] for row in rows] == ["plugins quantize_tokens and int8_product"]


@pytest.mark.parametrize(
    ("name", "options", "error", "reason"),
    [
        ("m.zip", {"architectures": ("sm_75",)}, InvalidArgument, "compiled for sm_80, sm_89, sm_90, got 'sm_75'"),
        ("m.zip", {"architectures": ()}, InvalidArgument, "got no architecture"),
        ("m.zip", {"sizes": {"y": {0: (1, 2, 3)}}}, InvalidArgument, "there is no input 'y'"),
        ("m.zip", {"opset": 24}, InvalidArgument, "tensorrt has no option 'opset'; there are architectures, sizes"),
        ("no/m.zip", {}, InvalidFile, "there is no folder"),
    ],
)
def test_what_is_refused_writes_nothing(program, tmp_path, name, options, error, reason):
    with pytest.raises(error, match=reason):
        program.export(tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_size_without_a_largest_value_is_named(tmp_path):
    program = gw.optimize(Mlp().eval(), (X,), dynamic_shapes=({0: Dim("batch")},), progress=False)
    with pytest.raises(UnsupportedLowering, match=r"x\[0\] has no largest size"):
        program.export(tmp_path / "m.zip")


def test_packed_caches_are_refused_by_name(tmp_path):
    program = gw.optimize(captured_llama(), methods=[gw.KVTuner(bits=8)], keep="smaller", progress=False)
    with pytest.raises(UnsupportedLowering, match="graphwright::cache_append: TensorRT computes nothing on bytes"):
        program.export(tmp_path / "m.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_command(program, tmp_path, monkeypatch):
    monkeypatch.setitem(targets.PACKAGES, "tensorrt", {"no_such_package": "tensorrt"})
    with pytest.raises(MissingExtra, match=r"needs no_such_package: pip install 'graphwright\[tensorrt\]'"):
        program.export(tmp_path / "m.zip")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("no space left")])
def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch, stop):
    program = gw.optimize(Mlp().eval(), (X,), progress=False)
    path = tmp_path / "m.zip"
    path.write_text("what was there")

    def interrupt(*_arguments):
        raise stop

    monkeypatch.setattr(write, "_zip", interrupt)
    with pytest.raises(InvalidFile if isinstance(stop, OSError) else KeyboardInterrupt):
        program.export(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there"]
