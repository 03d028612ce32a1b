"""Export to files: what is refused before anything is written, what an interruption leaves, and who reads the files."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidFile, InvalidType, MissingExtra, UnsupportedLowering
from graphwright.export import dry_run
from graphwright.lowering import registry, targets
from graphwright.lowering.to_onnx import models, session
from tests.models import Mlp

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program():
    return gw.optimize(Mlp().eval(), (X,), methods=[gw.Int8()], keep="smaller", progress=False)


@pytest.fixture(scope="module")
def path(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "mlp.onnx"
    program.export(path)
    return path


@pytest.mark.parametrize(
    ("name", "options", "error", "reason"),
    [
        ("mlp.tflite", {}, InvalidArgument, r"unknown suffix '.tflite'; there are .onnx \(onnx\)"),
        ("mlp.onnx", {"opset": 22}, InvalidArgument, "opset 22 is out of range: graphwright writes 23 and 24"),
        ("mlp.onnx", {"ops": "cuda"}, InvalidArgument, "ops must be one of portable, ort, function, got 'cuda'"),
        ("mlp.onnx", {"quality": 9}, InvalidArgument, "onnx has no option 'quality'; there are opset, ops"),
        ("no/mlp.onnx", {}, InvalidFile, "there is no folder"),
        ("", {}, InvalidArgument, "unknown suffix ''"),
    ],
)
def test_what_is_refused_writes_nothing(program, tmp_path, name, options, error, reason):
    with pytest.raises(error, match=reason):
        program.export(tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(program, tmp_path):
    (tmp_path / "mlp.onnx").mkdir()
    with pytest.raises(InvalidFile, match="is a directory"):
        program.export(tmp_path / "mlp.onnx")


def test_a_missing_package_is_named_with_the_command(program, tmp_path, monkeypatch):
    monkeypatch.setitem(targets.PACKAGES, "onnx", {"no_such_package": "onnx"})
    with pytest.raises(MissingExtra, match=r"onnx needs no_such_package: pip install 'graphwright\[onnx\]'"):
        program.export(tmp_path / "mlp.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"onnxruntime is not installed: pip install 'graphwright\[onnx\]'"):
        session.runtime()


def test_an_operator_without_lowering_is_named(program, tmp_path, monkeypatch):
    registry.load("onnx")
    monkeypatch.setattr(registry, "_LOWERINGS", {})
    monkeypatch.setattr(registry, "_FALLBACKS", {})
    with pytest.raises(UnsupportedLowering, match="to onnx: graphwright::int8_linear: nothing lowers it to onnx"):
        program.export(tmp_path / "mlp.onnx")
    assert list(tmp_path.iterdir()) == []


class Repeat(nn.Module):
    """Takes a number that is known when it runs."""

    def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
        return x * times


def test_a_number_as_input_is_named(tmp_path):
    shapes = {"x": None, "times": torch.export.Dim.DYNAMIC}
    program = gw.optimize(Repeat().eval(), (X, 3), dynamic_shapes=shapes, progress=False)
    with pytest.raises(UnsupportedLowering, match="input times is a number that is known when the program runs only"):
        program.export(tmp_path / "repeat.onnx")


class Airy(nn.Module):
    """An operator of PyTorch that ONNX has no words for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.special_airy_ai(x)


def test_an_operator_of_pytorch_without_translation_is_named(tmp_path):
    program = gw.optimize(Airy().eval(), (X,), progress=False)
    with pytest.raises(UnsupportedLowering, match="special_airy_ai"):
        program.export(tmp_path / "airy.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("no space left")])
def test_an_interrupted_export_leaves_what_was_there(program, tmp_path, monkeypatch, stop):
    path = tmp_path / "mlp.onnx"
    program.export(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupt(*_args, **_options):
        raise stop

    monkeypatch.setattr(models, "_check", interrupt)
    with pytest.raises(InvalidFile if isinstance(stop, OSError) else KeyboardInterrupt):
        program.export(path, ops="ort")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_opened_model_is_called_like_the_program(program, path):
    opened = gw.load(path)
    torch.testing.assert_close(opened(X), program(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(opened(x=X), program(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda opened: opened(), "missing input 'x'"),
        (lambda opened: opened(X, X), r"takes 1 inputs \(x\), got 2"),
        (lambda opened: opened(X, x=X), "two values for 'x'"),
        (lambda opened: opened(y=X), "there is no input 'y'; the inputs are x"),
        (lambda opened: opened(X.double()), r"x must be float32\[4, 32\], got float64\[4, 32\]"),
        (lambda opened: opened(X[:2]), r"x must be float32\[4, 32\], got float32\[2, 32\]"),
        (lambda opened: opened([1.0]), "x must be a tensor|hold"),
    ],
)
def test_calls_that_do_not_fit(path, call, reason):
    with pytest.raises(InvalidType, match=reason):
        call(gw.load(path))


def test_the_provider_is_the_one_that_was_asked_for(path, monkeypatch):
    with pytest.raises(InvalidArgument, match=r"'CUDAExecutionProvider' is not there.*pip install onnxruntime-gpu"):
        gw.load(path, provider="CUDAExecutionProvider")
    # onnxruntime-gpu without CUDA's libraries says that it has the provider, and falls back with a warning.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(
        InvalidArgument, match="asked for provider 'CUDAExecutionProvider', onnxruntime runs on 'CPUExe"
    ):
        gw.load(path, provider="CUDAExecutionProvider")
    with pytest.raises(InvalidArgument, match="provider and threads are for"):
        gw.load("program.gw", provider="CPUExecutionProvider")


def test_files_that_are_not_ours(path, tmp_path):
    with pytest.raises(InvalidFile, match="there is no such file"):
        gw.load(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(InvalidFile, match=r"bad\.onnx: "):
        gw.load(tmp_path / "bad.onnx")
    model = onnx.load(path)
    model.metadata_props[0].value = json.dumps({"kind": "module"})
    onnx.save(model, tmp_path / "forged.onnx")
    with pytest.raises(InvalidFile, match="its metadata is not graphwright's: KeyError"):
        gw.load(tmp_path / "forged.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(InvalidFile, match="was not exported by graphwright"):
        gw.load(tmp_path / "foreign.onnx")


def test_a_dry_run_says_what_each_operator_becomes(program):
    report = dry_run(program, "mlp.onnx", ops="ort")
    (rows,) = report.to_json()["phases"].values()
    assert [(row["operator"], row["calls"], row["becomes"]) for row in rows] == [
        ("int8_linear", 1, "MatMulIntegerToFloat (com.microsoft) of rounded tokens")
    ]
    assert "MatMulIntegerToFloat" in str(report)
    (rows,) = dry_run(program, "mlp.engine").to_json()["phases"].values()
    assert [row["becomes"] for row in rows] == ["DequantizeLinear of an 8-bit weight, MatMul"]
    with pytest.raises(InvalidArgument, match="ops must be one of"):
        dry_run(program, "mlp.onnx", ops="cuda")


def test_netron_reads_the_file(path):
    code = "import netron, sys; print(netron.start(sys.argv[1], browse=False)); sys.stdout.flush(); netron.wait()"
    server = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        lines = (server.stdout.readline() for _ in range(5))
        address = next(line for line in lines if line.startswith("('"))
        host, port = address.strip("()\n").split(", ")
        url = f"http://{host.strip(chr(39))}:{port}"
        with urllib.request.urlopen(f"{url}/data/{path.name}", timeout=30) as answer:
            served = onnx.load_model_from_string(answer.read())
    finally:
        server.kill()
        server.wait()
    assert [node.op_type for node in served.graph.node].count("MatMulInteger") == 1
