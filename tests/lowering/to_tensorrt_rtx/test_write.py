"""Engines of programs: files, dynamic sizes, what is refused before anything is built, and an interruption."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch import nn
from torch.export import Dim

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidFile, MissingExtra, UnsupportedLowering
from graphwright.export import dry_run
from graphwright.lowering import targets
from graphwright.lowering.to_onnx.lower import lower_onnx
from graphwright.progress import Progress
from tests.models import Mlp, captured_llama

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
needs_rtx = pytest.mark.skipif(targets.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


@pytest.fixture(scope="module")
def program():
    batch = Dim("batch", min=1, max=64)
    shapes = ({0: batch},)
    return gw.optimize(Mlp().eval(), (X,), dynamic_shapes=shapes, methods=[gw.Int8()], keep="smaller", progress=False)


def description(path):
    return json.loads(path.with_name(f"{path.name}.json").read_text())


@needs_rtx
def test_an_engine_for_each_phase_and_what_they_take(tmp_path):
    program = gw.optimize(captured_llama(), progress=False)
    path = tmp_path / "llama.engine"
    files = program.export(path, compute_capabilities=("sm_89", "sm_120"), sizes={"input_ids": {1: (2, 10, 24)}})
    names = ["llama.decode.engine", "llama.engine", "llama.engine.json", "llama.prefill.engine"]
    assert [file.name for file in files] == sorted(file.name for file in tmp_path.iterdir()) == names
    told = description(path)
    assert told["compute_capabilities"] == ["sm_89", "sm_120"]
    assert told["state"] == {f"{kind}_cache_{layer}": 0.0 for layer in range(2) for kind in ("key", "value")}
    phases = {phase["plan"]["name"]: phase for phase in told["phases"]}
    assert phases["decode"]["sizes"] == {}
    assert phases["prefill"]["sizes"] == {
        "input_ids": [[1, 2], [1, 10], [1, 24]],
        "cache_position": [[2], [10], [24]],
    }, "the position has the same size"
    assert phases["decode"]["inputs"][:3] == ["input_ids", "cache_position", "past.key_cache_0"]
    assert phases["decode"]["outputs"][:2] == ["output", "present.key_cache_0"]
    for phase in phases.values():
        assert (tmp_path / phase["file"]).stat().st_size > program.weight_bytes()
        assert sum(layer["kind"] == "attention_input" for layer in phase["layers"]) == 2


@needs_rtx
@pytest.mark.parametrize(
    ("name", "options", "error", "reason"),
    [
        (
            "m.engine",
            {"compute_capabilities": ("sm_90",)},
            InvalidArgument,
            "no 'sm_90'; there are sm_75, sm_80, sm_86",
        ),
        ("m.engine", {"compute_capabilities": ()}, InvalidArgument, "name at least one, such as 'sm_89'"),
        ("m.engine", {"sizes": {"y": {0: (1, 2, 3)}}}, InvalidArgument, "there is no input 'y'; there are x"),
        ("m.engine", {"sizes": {"x": {1: (1, 2, 3)}}}, InvalidArgument, r"x\[1\] is not dynamic in any phase"),
        ("m.engine", {"sizes": {"x": {5: (1, 2, 3)}}}, InvalidArgument, r"x\[5\] is not dynamic in any phase"),
        (
            "m.engine",
            {"sizes": {"x": {0: (3, 2, 1)}}},
            InvalidArgument,
            r"must be \(least, usual, largest\), got \(3, 2",
        ),
        ("m.engine", {"sizes": {"x": {0: (1, 2, 99)}}}, InvalidArgument, "was captured for 1 to 64, got"),
        ("m.engine", {"opset": 24}, InvalidArgument, "tensorrt_rtx has no option 'opset'; there are compute_capabi"),
        ("no/m.engine", {}, InvalidFile, "there is no folder"),
    ],
)
def test_what_is_refused_writes_nothing(program, tmp_path, name, options, error, reason):
    with pytest.raises(error, match=reason):
        program.export(tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_a_size_without_a_largest_value_is_named(tmp_path):
    program = gw.optimize(Mlp().eval(), (X,), dynamic_shapes=({0: Dim("batch")},), progress=False)
    with pytest.raises(UnsupportedLowering, match=r"x\[0\] has no largest size: capture it with Dim\(max=\.\.\.\), or"):
        program.export(tmp_path / "m.engine")
    program.export(tmp_path / "m.engine", sizes={"x": {0: (1, 4, 8)}})
    (phase,) = description(tmp_path / "m.engine")["phases"]
    assert phase["sizes"] == {"x": [[1, 32], [4, 32], [8, 32]]}


class Bytes(nn.Module):
    """Arithmetic on bytes, which the parser does not take."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 255).to(torch.uint8) + 1


@needs_rtx
def test_the_parser_s_refusal_names_the_node(tmp_path):
    program = gw.optimize(Bytes().eval(), (X,), progress=False)
    with pytest.raises(UnsupportedLowering, match=r"its parser refuses 1 nodes of main: \w+ \(\w+\): .*UINT8.*Export"):
        program.export(tmp_path / "m.engine")
    assert list(tmp_path.iterdir()) == []


def test_operators_are_refused_by_name_before_anything_is_built():
    program = gw.optimize(captured_llama(), methods=[gw.KVTuner(bits=8)], keep="smaller", progress=False)
    assert "refused: TensorRT-RTX computes nothing on bytes" in str(dry_run(program, "m.engine").to_json())
    with pytest.raises(UnsupportedLowering, match="graphwright::cache_append: TensorRT-RTX computes nothing on bytes"):
        lower_onnx(program.phases["decode"].exported, target="tensorrt_rtx")


def test_a_missing_package_is_named_with_the_command(program, tmp_path, monkeypatch):
    monkeypatch.setitem(targets.PACKAGES, "tensorrt_rtx", {"no_such_package": "tensorrt-rtx"})
    with pytest.raises(MissingExtra, match=r"needs no_such_package: pip install 'graphwright\[tensorrt-rtx\]'"):
        program.export(tmp_path / "m.engine")


@needs_rtx
def test_ctrl_c_stops_the_builder_and_leaves_what_was_there(program, tmp_path, monkeypatch):
    path = tmp_path / "m.engine"
    path.write_text("what was there")
    steps = []

    def press(bar, note="", advance=1):
        steps.append(note)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "step", press)
    with pytest.raises(KeyboardInterrupt):
        program.export(path)
    assert len(steps) < 20, "the builder makes 97 when it is let"
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
