"""Surgery on exported programs: what is undone is gone, and the signature stays true."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from graphwright.errors import VerificationError
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.dialects import run_functional
from graphwright.passes.edit import Edit
from graphwright.patterns.text import graph_text
from tests.graph_text import functional, operators

aten = torch.ops.aten


class Small(nn.Module):
    """Two linears, a product of a value with itself, state, and three outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.one(x)
        b = self.two(a.cos())
        self.steps.add_(1)
        return a * b, b * b, self.steps + a


_SMALL = functional(Small(), torch.randn(2, 4))


def small() -> ExportedProgram:
    return copy_exported(_SMALL)


def calls(exported: ExportedProgram, name: str = "") -> list[Node]:
    return [n for n in exported.graph.nodes if n.op == "call_function" and name in str(n.target)]


def of_shape(exported: ExportedProgram) -> list[Node]:
    return [node for node in calls(exported) if tuple(node.meta["val"].shape) == (2, 4)]


ACTION = st.tuples(st.sampled_from(["insert", "replace", "merge", "wrap", "buffer"]), st.integers(0, 99))


def act(edit: Edit, name: str, choice: int) -> None:
    """One random edit among the [2, 4] values; order in the graph is kept."""
    values = [node for node in of_shape(edit.exported) if edit.current(node) is node]
    position = choice % len(values)
    node = values[position]
    if name == "insert":
        edit.call(aten.sin.default, node, like=node, before=node.next)
    elif name == "replace" and position:
        edit.replace(node, edit.call(aten.relu.default, values[choice % position], like=node))
    elif name == "merge" and position:
        edit.replace(node, values[choice % position])
    elif name == "wrap":
        wrapped = edit.call(aten.neg.default, node, like=node, before=node.next)
        edit.replace(node, wrapped)
    elif name == "buffer":
        stored = edit.buffer(f"made.{choice % 3}", lambda: torch.full((4,), 2.0))
        edit.replace(node, edit.call(aten.mul.Tensor, node, stored, like=node, before=node.next))


@settings(max_examples=80, deadline=None, derandomize=True, phases=[Phase.generate])
@given(changes=st.lists(st.lists(ACTION, min_size=1, max_size=5), min_size=1, max_size=4))
def test_undo_restores_the_graph_exactly(changes) -> None:
    exported = small()
    edit = Edit(exported)
    x = torch.randn(2, 4)
    texts, done = [graph_text(exported)], []
    for actions in changes:
        with edit.transaction("random") as change:
            for name, choice in actions:
                act(edit, name, choice)
        done.append(change)
        texts.append(graph_text(exported))
    exported.graph.lint()
    for change in reversed(done):
        texts.pop()
        change.undo()
        assert graph_text(exported) == texts[-1]
    edit.finish()
    exported.validate()
    assert all(
        torch.equal(a, b) for a, b in zip(run_functional(_SMALL, [x]), run_functional(exported, [x]), strict=True)
    )
    assert set(exported.state_dict) == set(_SMALL.state_dict), "buffers of what was undone are dropped"


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(actions=st.lists(ACTION, min_size=1, max_size=8))
def test_a_body_that_raises_leaves_no_trace(actions) -> None:
    exported = small()
    before = graph_text(exported)
    edit = Edit(exported)

    def body() -> None:
        for name, choice in actions:
            act(edit, name, choice)
        raise RuntimeError("made to fail")

    with pytest.raises(RuntimeError, match="made to fail"), edit.transaction("failing"):
        body()
    assert graph_text(exported) == before


def test_undo_tells_two_reads_of_one_user_apart() -> None:
    """a * b with a replaced by b reads b twice; undo must bring back a in its place only."""
    exported = small()
    edit = Edit(exported)
    product = calls(exported, "mul.Tensor")[0]
    a, b = product.args
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    with edit.transaction("merge") as change:
        edit.replace(a, b)
    assert product.args == (b, b)
    change.undo()
    assert product.args == (a, b)


def test_undo_is_refused_when_others_build_on_it_and_changes_nothing() -> None:
    exported = small()
    edit = Edit(exported)
    first = calls(exported, "linear")[0]
    with edit.transaction("first") as below:
        replacement = edit.call(aten.relu.default, first.args[0], like=first)
        edit.replace(first, replacement)
    with edit.transaction("second") as above:
        cos = calls(exported, "cos")[0]
        edit.replace(cos, edit.call(aten.sin.default, replacement, like=cos))
    before = graph_text(exported)
    with pytest.raises(VerificationError, match=r"first: .* builds on relu_default"):
        below.undo()
    assert graph_text(exported) == before
    above.undo()
    below.undo()
    assert graph_text(exported) == graph_text(_SMALL)
    below.undo()  # A second time is the same as once.
    assert graph_text(exported) == graph_text(_SMALL)


def test_a_site_reads_what_an_earlier_transaction_put_there() -> None:
    """Sites are matched before any is rewritten: the second's input node is the first's old output."""
    exported = small()
    edit = Edit(exported)
    first = calls(exported, "linear")[0]
    with edit.transaction("first") as change:
        replacement = edit.call(aten.relu.default, first.args[0], like=first)
        edit.replace(first, replacement)
    cos = calls(exported, "cos")[0]
    with edit.transaction("second") as second:
        assert edit.call(aten.sin.default, first, like=cos).args == (replacement,)
    second.undo()
    change.undo()
    with edit.transaction("third"):
        assert edit.call(aten.sin.default, first, like=cos).args == (first,)


def test_a_transaction_may_wrap_what_it_replaces() -> None:
    exported = small()
    edit = Edit(exported)
    cos = calls(exported, "cos")[0]
    with edit.transaction("wrap"):
        wrapped = edit.call(aten.neg.default, cos, like=cos, before=cos.next)
        edit.replace(cos, wrapped)
    assert wrapped.args == (cos,)
    assert list(cos.users) == [wrapped]


def test_rolled_back_buffers_stay_usable_by_others() -> None:
    exported = small()
    edit = Edit(exported)
    made = []

    def make() -> Tensor:
        made.append(1)
        return torch.ones(4)

    changes = []
    for linear in calls(exported, "linear"):
        with edit.transaction("use") as change:
            stored = edit.buffer("one.weight.gain", make)
            edit.replace(linear, edit.call(aten.mul.Tensor, linear, stored, like=linear, before=linear.next))
        changes.append(change)
    assert made == [1], "made once, whatever the number of sites"
    changes[0].undo()
    edit.finish()
    exported.validate()
    assert operators(exported).count("mul") == 3


def test_phases_share_the_buffers_that_are_made() -> None:
    shared: dict[str, Tensor] = {}
    made, programs = [], [small(), small()]
    for exported in programs:
        edit = Edit(exported, shared)
        linear = calls(exported, "linear")[0]
        stored = edit.buffer("gain", lambda: made.append(1) or torch.ones(4))
        edit.replace(linear, edit.call(aten.mul.Tensor, linear, stored, like=linear, before=linear.next))
        edit.finish()
        exported.validate()
    assert made == [1]
    assert programs[0].state_dict["gain"] is programs[1].state_dict["gain"]


def test_finish_drops_dead_calls_and_weights_but_no_state() -> None:
    exported = small()
    edit = Edit(exported)
    first = calls(exported, "linear")[0]
    edit.replace(first, edit.call(aten.relu.default, first.args[0], like=first))
    assert edit.finish() == 1
    exported.validate()
    assert set(exported.state_dict) == {"two.weight", "two.bias", "steps"}
    assert [spec.target for spec in exported.graph_signature.input_specs] == ["two.weight", "two.bias", "steps", None]
    assert exported.module()(torch.ones(2, 4))[0].shape == (2, 4)


def test_outputs_are_renamed_in_the_signature() -> None:
    exported = small()
    edit = Edit(exported)
    returned = exported.graph.output_node().args[0]
    assert isinstance(returned, list | tuple)
    for value in list(returned):
        assert isinstance(value, Node)
        edit.replace(value, edit.call(aten.neg.default, value, like=value, before=value.next))
    edit.finish()
    exported.validate()
    names = [spec.arg.name for spec in exported.graph_signature.output_specs]
    returned = exported.graph.output_node().args[0]
    assert isinstance(returned, list | tuple)
    assert names == [value.name for value in returned]
    assert next(iter(exported.graph_signature.buffers_to_mutate)) == names[0]


def test_new_calls_have_metadata_place_and_provenance() -> None:
    exported = small()
    edit = Edit(exported)
    edit.provenance = {"pass": "test", "site": "main/one/linear[0]"}
    linear = calls(exported, "linear")[0]
    node = edit.call(aten.sum.dim_IntList, linear, [1], like=linear, before=linear.next)
    assert node.meta["graphwright"] == {"pass": "test", "site": "main/one/linear[0]"}
    assert tuple(node.meta["val"].shape) == (2,)
    assert node.meta["nn_module_stack"] == linear.meta["nn_module_stack"]
    assert edit.view.module_path(node) == "one"
    assert edit.touched == [node]


def test_shadow_mode_changes_nothing_that_is_returned() -> None:
    exported = small()
    edit = Edit(exported)
    edit.shadow = True
    linear = calls(exported, "linear")[0]
    with edit.transaction("shadow") as change:
        variant = edit.call(aten.relu.default, linear.args[0], like=linear)
        edit.replace(linear, variant)
    assert not variant.users
    assert [(old, new) for old, new, _ in change.redirected] == [(linear, variant)]
    with edit.transaction("next"):
        assert edit.call(aten.sin.default, linear, like=calls(exported, "cos")[0]).args == (linear,)


def test_a_copy_shares_tensors_and_leaves_the_original() -> None:
    original = copy_exported(_SMALL)
    text, signature = graph_text(original), str(original.graph_signature)
    copied = copy_exported(original)
    assert all(copied.state_dict[name] is tensor for name, tensor in original.state_dict.items())
    assert graph_text(copied) == text
    assert str(copied.graph_signature) == signature
    edit = Edit(copied)
    for linear in calls(copied, "linear"):
        stored = edit.buffer("gain", lambda: torch.ones(4))
        edit.replace(linear, edit.call(aten.mul.Tensor, linear.args[0], stored, like=linear))
    edit.finish()
    copied.validate()
    original.validate()
    assert graph_text(original) == text
    assert str(original.graph_signature) == signature
    assert "gain" not in original.state_dict
    assert not set(original.graph.nodes) & set(copied.graph.nodes)


def test_inputs_named_like_builtins_keep_their_names() -> None:
    class Builtin(nn.Module):
        def forward(self, input: Tensor, max: Tensor) -> Tensor:
            return input + max

    exported = functional(Builtin(), torch.ones(2), torch.ones(2))
    copied = copy_exported(exported)
    copied.validate()
    assert list(copied.graph_signature.user_inputs) == ["input", "max"]
    assert torch.equal(copied.module()(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


def test_a_computed_value_is_no_constant() -> None:
    exported = small()
    with pytest.raises(VerificationError, match="is not a stored tensor"):
        Edit(exported).constant(calls(exported, "cos")[0])
