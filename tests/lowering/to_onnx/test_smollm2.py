"""Canonical SmolLM2 through all phases in ONNX Runtime: what nodes it has, what is shared, that nothing is copied."""

from __future__ import annotations

import onnx
import pytest

import graphwright as gw
from graphwright.lowering.to_onnx.lower import lower_onnx
from tests.lowering.to_onnx.programs import chained, greedy, node_types, relative, smollm2

GREEDY = 64


@pytest.fixture(scope="module")
def program():
    return smollm2()


@pytest.fixture(scope="module")
def path(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "smollm2.onnx"
    files = program.export(path)
    assert sorted(file.name for file in files) == sorted(file.name for file in path.parent.iterdir())
    return path


@pytest.fixture(scope="module")
def opened(path):
    return gw.load(path)


def test_every_phase_gives_the_same_logits(program, opened):
    # Float32 sums of up to 1536 terms in another order: 1536^0.5 * 2^-24 = 2e-6 of the largest value, two layers.
    wanted = chained(program)
    assert relative(chained(opened), wanted) < 1e-5
    assert relative(chained(opened), wanted) < 1e-5, "reset gives an empty cache"


def test_greedy_tokens_are_identical(program, opened):
    assert greedy(opened, GREEDY) == greedy(program, GREEDY)


def test_attention_norms_and_rotations_are_standard_operators(path):
    for phase, causal in (("prefill", True), ("decode", False)):
        model = onnx.load(path.with_name(f"smollm2.{phase}.onnx"), load_external_data=False)
        types = node_types(path.with_name(f"smollm2.{phase}.onnx"))
        assert (types["Attention"], types["RMSNormalization"], types["RotaryEmbedding"]) == (2, 5, 4)
        assert {node.domain for node in model.graph.node} == {""}
        assert [entry.version for entry in model.opset_import] == [23]
        for node in model.graph.node:
            if node.op_type == "Attention":
                given = {attribute.name: attribute.i for attribute in node.attribute}
                assert bool(given.get("is_causal", 0)) is causal
                known = (*model.graph.value_info, *model.graph.output)
                keys = next(value for value in known if value.name == node.input[1])
                assert keys.type.tensor_type.shape.dim[1].dim_value == 3, "heads stay grouped"


def test_sizes_stay_dynamic(path):
    model = onnx.load(path, load_external_data=False)
    sizes = {value.name: [size.dim_param for size in value.type.tensor_type.shape.dim] for value in model.graph.input}
    assert sizes["input_ids"][1]
    assert sizes["input_ids"][1] == sizes["cache_position"][0]


def test_phases_share_one_file_of_weights(program, path):
    # The cache is no weight, and the graphs are small beside what they compute with.
    assert sum(file.stat().st_size for file in path.parent.iterdir()) <= 1.02 * program.weight_bytes()
    for model in path.parent.glob("*.onnx"):
        tensors = onnx.load(model, load_external_data=False).graph.initializer
        places = {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}
        assert places == {"smollm2.onnx.data"}
        assert model.stat().st_size < 100_000


def test_the_cache_is_written_where_it_lies(opened):
    opened.reset()
    addresses = {name: tensor.data_ptr() for name, tensor in opened.state.now.items()}
    before = {name: tensor.clone() for name, tensor in opened.state.now.items()}
    chained(opened)
    assert {name: tensor.data_ptr() for name, tensor in opened.state.now.items()} == addresses
    assert all(not tensor.equal(before[name]) for name, tensor in opened.state.now.items())
    assert all(opened.state.next[name] is tensor for name, tensor in opened.state.now.items())


def test_the_other_opset(program):
    lowered = lower_onnx(program.phases["decode"].exported, opset=24)
    assert lowered.model.opset_imports[""] == 24
