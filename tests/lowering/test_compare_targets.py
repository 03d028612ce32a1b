"""The same calls on every target, state included, and what the comparison says of a wrong one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.errors import InvalidArgument
from graphwright.export import compare_targets
from graphwright.lowering.to_onnx.program import OnnxProgram
from tests.models import captured_llama, tokens

ONNX = ("onnx portable", "onnx ort")


@pytest.fixture(scope="module")
def program():
    return gw.optimize(captured_llama(), methods=[gw.Int8()], keep="smaller", progress=False)


def calls():
    text = tokens(9)
    return [((text[:, a:b], torch.arange(a, b)), {}) for a, b in ((0, 4), (4, 8), (8, 9))]


def test_onnx_agrees(program):
    found = compare_targets(program, calls(), ONNX)
    assert [row.target for row in found] == list(ONNX)
    assert all(row.holds for row in found), found
    assert {row.tolerance for row in found} == {1024 * torch.finfo(torch.float32).eps}


class Counter(nn.Module):
    """Adds up what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total * 2


def test_state_that_is_lost_shows(monkeypatch):
    program = gw.optimize(Counter().eval(), (torch.ones(3),), progress=False)
    twice = [((torch.ones(3),), {})] * 2
    (row,) = compare_targets(program, twice, ("onnx portable",))
    assert row.holds
    assert row.largest == 0
    whole = OnnxProgram.__call__

    def forgetful(self, *args, **kwargs):
        self.reset()
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(OnnxProgram, "__call__", forgetful)
    (row,) = compare_targets(program, twice, ("onnx portable",))
    assert row.relative == 0.5
    assert not row.holds


def test_unknown_targets_are_refused(program):
    with pytest.raises(InvalidArgument, match="unknown target 'coreml'; there are onnx portable"):
        compare_targets(program, calls(), ("coreml",))
