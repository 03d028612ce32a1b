"""A package in a process in which graphwright cannot be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.errors import InvalidArgument, MissingExtra, UnsupportedLowering
from tests.models import Mlp

CODE = """
import sys, types
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "graphwright":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import json, torch
import torch._inductor
package = torch._inductor.aoti_load_package(sys.argv[1])
names = json.loads(package.get_metadata()["graphwright"])
given = torch.load(sys.argv[2])
total = given.pop("total")
for x in given["calls"]:
    y, total = package(x, total)
    given.setdefault("outputs", []).append(y)
assert "graphwright" not in sys.modules
torch.save({**given, "total": total, "names": names}, sys.argv[2])
"""


class Model(nn.Module):
    """Two linears, and a sum over the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.register_buffer("total", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        self.total.add_(y.sum(0))
        return y + self.total


@pytest.fixture(scope="module")
def program():
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    method = gw.Int8()
    return gw.optimize(Model().eval(), (x,), dynamic_shapes=sizes, methods=[method], keep="smaller", progress=False)


def test_it_runs_without_graphwright_with_state_passed_in_and_out(program, tmp_path):
    assert any("int8_linear" in str(node.target) for node in program.phases["main"].exported.graph.nodes)
    assert program.export(tmp_path / "model.pt2") == [tmp_path / "model.pt2"]
    calls = [torch.randn(count, 32, generator=torch.Generator().manual_seed(count)) for count in (4, 7, 1)]
    program.reset()
    values = tmp_path / "values.pt"
    torch.save({"calls": calls, "total": torch.zeros(32)}, values)
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path / "model.pt2"), str(values)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(values)
    # Sums of up to 64 float32 products, and of 12 rows.
    for got, x in zip(found["outputs"], calls, strict=True):
        torch.testing.assert_close(got, program(x), rtol=1e-5, atol=1e-5)
    assert found["names"] == {"inputs": ["x", "past.total"], "outputs": ["output", "present.total"]}


def test_refused(program, tmp_path, monkeypatch):
    with pytest.raises(InvalidArgument, match="aoti has no option 'opset'; there are none"):
        program.export(tmp_path / "model.pt2", opset=23)
    monkeypatch.setattr("graphwright.lowering.registry._LOWERINGS", {})
    monkeypatch.setattr("graphwright.lowering.registry._FALLBACKS", {})
    with pytest.raises(UnsupportedLowering, match="to aoti: graphwright::int8_linear: nothing lowers it"):
        program.export(tmp_path / "model.pt2")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingExtra, match=r"aoti needs a C\+\+ compiler: install g\+\+"):
        program.export(tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
