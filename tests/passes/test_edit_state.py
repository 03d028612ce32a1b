"""State that a program keeps in another form: signature, undo, and what is left of the old buffer."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from graphwright.errors import VerificationError
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.dialects import run_functional, verify
from graphwright.passes.edit import Edit
from graphwright.patterns.text import graph_text
from graphwright.phases import state_of
from tests.graph_text import functional

aten = torch.ops.aten


class Counter(nn.Module):
    """Two buffers that are written, one of them also read by the output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.total.copy_(self.total + x)
        self.calls.add_(1)
        return x * 2


_COUNTER = functional(Counter(), torch.randn(4))


def counter() -> ExportedProgram:
    return copy_exported(_COUNTER)


def written(edit: Edit, name: str) -> Node:
    """The value that a buffer becomes."""
    return next(node for node in edit.graph.nodes if edit.view.mutated.get(node.name) == name)


def keep_as_half(edit: Edit) -> None:
    old = written(edit, "total")
    store = edit.state("total.half", lambda: torch.zeros(4, dtype=torch.float16))
    wide = edit.call(aten.to.dtype, store, torch.float32, like=old)
    x = next(node for node in edit.graph.find_nodes(op="placeholder") if node.name == "x")
    value = edit.call(aten.to.dtype, edit.call(aten.add.Tensor, wide, x, like=old), torch.float16, like=old)
    edit.keep(old, store, value)


def test_another_buffer_is_kept_and_the_old_one_is_gone():
    exported = counter()
    edit = Edit(exported)
    with edit.transaction("half"):
        keep_as_half(edit)
    edit.finish()
    verify(exported, "canonical", "half", edit.touched)
    assert set(state_of(exported)) == {"total.half", "calls"}
    assert "total" not in exported.state_dict
    x = torch.randn(4)
    total, calls, output = run_functional(exported, [x])
    assert total.dtype == torch.float16
    torch.testing.assert_close(total, x.half())
    assert torch.equal(calls, torch.ones(4))
    assert torch.equal(output, x * 2)


def test_undo_puts_the_old_buffer_back():
    exported = counter()
    edit = Edit(exported)
    before = graph_text(exported)
    x = torch.randn(4)
    wanted = run_functional(exported, [x])
    with edit.transaction("half") as change:
        keep_as_half(edit)
    assert set(state_of(exported)) == {"total.half", "calls"}
    change.undo()
    edit.finish()
    verify(exported, "canonical", "undo", edit.touched)
    assert graph_text(exported) == before
    assert set(state_of(exported)) == {"total", "calls"}
    for found, expected in zip(run_functional(exported, [x]), wanted, strict=True):
        assert torch.equal(found, expected)


def test_a_rewrite_that_raises_leaves_the_state_as_it_was():
    exported = counter()
    edit = Edit(exported)
    before = graph_text(exported)
    with pytest.raises(ZeroDivisionError):
        keep_and_raise(edit)
    edit.finish()
    assert graph_text(exported) == before
    assert set(state_of(exported)) == {"total", "calls"}


def keep_and_raise(edit: Edit) -> None:
    with edit.transaction("half"):
        keep_as_half(edit)
        raise ZeroDivisionError


def test_in_shadow_mode_the_state_stays():
    exported = counter()
    edit = Edit(exported)
    edit.shadow = True
    with edit.transaction("half") as change:
        keep_as_half(edit)
    assert len(change.kept) == 1
    assert set(state_of(exported)) == {"total", "calls"}


def test_what_is_not_kept_cannot_be_kept_otherwise():
    edit = Edit(counter())
    x = next(node for node in edit.graph.find_nodes(op="placeholder") if node.name == "x")
    store = edit.state("other", lambda: torch.zeros(4))
    with pytest.raises(VerificationError, match="x is kept in 0 buffers"):
        edit.keep(x, store, x)


def keep_a_copy(edit: Edit, name: str) -> Node:
    """Besides what is kept, keep three times the input."""
    x = next(node for node in edit.graph.find_nodes(op="placeholder") if node.name == "x")
    value = edit.call(aten.mul.Tensor, x, 3.0, like=written(edit, "calls"))
    edit.keep_too(edit.state(name, lambda: torch.zeros(4)), value)
    return value


def double_the_output(edit: Edit) -> None:
    old = next(node for node in edit.graph.nodes if node.target is aten.mul.Tensor and node.args[1] == 2)
    edit.replace(old, edit.call(aten.mul.Tensor, old.args[0], 4, like=old))


def test_more_can_be_kept_than_was():
    exported = counter()
    edit = Edit(exported)
    with edit.transaction("more"):
        keep_a_copy(edit, "one")
        keep_a_copy(edit, "two")
    edit.finish()
    verify(exported, "canonical", "more", edit.touched)
    assert list(state_of(exported)) == ["total", "calls", "one", "two"]
    x = torch.randn(4)
    total, calls, one, two, output = run_functional(exported, [x])
    assert torch.equal(one, 3 * x)
    assert torch.equal(two, one)
    assert torch.equal(output, x * 2)
    assert torch.equal(total, x)
    assert torch.equal(calls, torch.ones(4))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_what_is_kept_besides_is_undone_in_any_order(order):
    """Outputs move when one is added or taken away, and what was redirected before is still found."""
    exported = counter()
    edit = Edit(exported)
    before = graph_text(exported)
    x = torch.randn(4)
    wanted = run_functional(exported, [x])
    changes = []
    for rewrite in (
        double_the_output,
        lambda edit: keep_a_copy(edit, "one"),
        lambda edit: (keep_as_half(edit), keep_a_copy(edit, "two")),
    ):
        with edit.transaction("t") as change:
            rewrite(edit)
        changes.append(change)
    for number in order:
        changes[number].undo()
    edit.finish()
    verify(exported, "canonical", "undo", edit.touched)
    assert graph_text(exported) == before
    for found, expected in zip(run_functional(exported, [x]), wanted, strict=True):
        assert torch.equal(found, expected)


def test_a_rewrite_that_raises_keeps_nothing_more():
    exported = counter()
    edit = Edit(exported)
    before = graph_text(exported)
    with pytest.raises(ZeroDivisionError), edit.transaction("t"):  # noqa: PT012 (the transaction has to see it)
        keep_a_copy(edit, "one")
        raise ZeroDivisionError
    edit.finish()
    assert graph_text(exported) == before
