"""Every operator is decided for every target, and a dry run says what each call becomes."""

from __future__ import annotations

from typing import get_args

import pytest

from graphwright.errors import InvalidArgument, UnsupportedLowering
from graphwright.kernels.contract import OPERATORS
from graphwright.lowering import registry
from graphwright.lowering.registry import Lowering, choose, choose_all, require, summarize, uncovered
from graphwright.lowering.targets import Target, target_of
from tests.lowering.operator_calls import CALLS

TARGETS = get_args(Target)


@pytest.fixture
def own_entries(monkeypatch):
    """A test's registrations, gone afterwards."""
    registry.load("onnx")
    monkeypatch.setattr(registry, "_LOWERINGS", {key: list(value) for key, value in registry._LOWERINGS.items()})
    monkeypatch.setattr(registry, "_REFUSALS", dict(registry._REFUSALS))


def call_of(name: str):
    (node,) = [node for node in CALLS[name].program().graph.nodes if registry.name_of(node)]
    return node


@pytest.mark.parametrize("target", TARGETS)
def test_every_operator_is_lowered_or_refused(target):
    assert uncovered(target) == []
    assert uncovered(target, [*OPERATORS, "new_operator"]) == ["new_operator"]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_decided_of_operators_that_do_not_exist(target):
    registry.load(target)
    assert {name for name, _ in (*registry._LOWERINGS, *registry._REFUSALS)} <= set(OPERATORS)


def test_every_operator_has_a_call_in_the_tests_or_is_refused():
    called = {name.split(",")[0].split(" ")[0] for name in CALLS}
    assert {name for name in OPERATORS if name not in called and registry.refusal(name, "onnx") is None} == set()


def test_the_highest_priority_that_validates_is_taken_and_the_others_say_why(own_entries):
    registry.register(Lowering("hadamard", "onnx", "never", validate=lambda *_: "it is Monday", priority=99))
    registry.register(Lowering("hadamard", "onnx", "best", priority=98))
    choice = choose(call_of("hadamard"), "onnx")
    assert choice.lowering is not None
    assert choice.lowering.becomes == "best"
    assert choice.passed_over == (("never", "it is Monday"),)
    (row,) = summarize([choice, choice])
    assert (row.calls, row.becomes, row.passed_over) == (2, "best", {"never": "it is Monday"})


def test_lowerings_stand_for_their_choices_only():
    node = call_of("int8_linear")
    assert "MatMulIntegerToFloat" in choose(node, "onnx", "ort").lowering.becomes
    assert "MatMulInteger" in choose(node, "onnx", "portable").lowering.becomes


def test_what_has_no_lowering_is_refused_by_name():
    choices = choose_all(CALLS["cache_append, a piece"].program().graph.nodes, "tensorrt")
    with pytest.raises(UnsupportedLowering, match="to tensorrt: graphwright::cache_append: TensorRT computes nothing"):
        require(choices, "tensorrt")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: registry.load("coreml"), "unknown target 'coreml'; there are eager, aoti"),
        (lambda: registry.refuse("hadamard", "coreml", "no"), "unknown target 'coreml'"),
        (lambda: target_of("model.tflite"), r"unknown suffix '.tflite'; there are .onnx \(onnx\)"),
        (lambda: target_of("model"), "unknown suffix ''"),
    ],
)
def test_unknown_targets(call, reason):
    with pytest.raises(InvalidArgument, match=reason):
        call()
