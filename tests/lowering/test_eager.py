"""State in the eager lowering: written in place where nobody sees the difference, copied where somebody would."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from graphwright.lowering.eager import lower_eager
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from tests.graph_text import functional
from tests.models import CACHE, captured_llama, tokens


def lowered(exported: ExportedProgram) -> GraphModule:
    module = lower_eager(exported)
    assert isinstance(module, GraphModule)
    return module


def operators(module: GraphModule) -> list[str]:
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    return [name.removeprefix("aten.").split(".")[0] for name in names]


class Cache(nn.Module):
    """Rows written at positions, then all read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.zeros(8, 4))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.held.index_copy_(0, at, x)
        return self.held.sum(0)


def test_a_cache_is_written_in_place_without_a_copy() -> None:
    exported = functional(Cache(), torch.randn(2, 4), torch.tensor([0, 1]))
    canonicalize(exported)
    module = lowered(exported)
    assert operators(module) == ["index_copy_", "sum"]
    held = exported.state_dict["held"]
    address = held.data_ptr()
    x = torch.randn(2, 4)
    (total,) = module(x, torch.tensor([5, 2]))
    assert exported.state_dict["held"] is held
    assert held.data_ptr() == address
    assert torch.equal(held[[5, 2]], x)
    torch.testing.assert_close(total, x.sum(0))


def test_the_caches_of_a_decoder_are_all_written_in_place() -> None:
    exported = copy_exported(captured_llama().exported)
    canonicalize(exported)
    module = lowered(exported)
    found = operators(module)
    assert found.count("index_copy_") == 4
    assert not {"index_copy", "copy_", "clone"} & set(found)
    state = [exported.state_dict[name] for name in exported.graph_signature.buffers_to_mutate.values()]
    addresses = [tensor.data_ptr() for tensor in state]
    with torch.no_grad():
        module(tokens(3), torch.arange(3))
    assert [tensor.data_ptr() for tensor in state] == addresses
    for tensor in state:
        assert tensor.shape[2] == CACHE
        assert tensor[:, :, :3].any()
        assert not tensor[:, :, 3:].any()
        tensor.zero_()


def test_the_program_itself_is_not_changed() -> None:
    exported = functional(Cache(), torch.randn(2, 4), torch.tensor([0, 1]))
    before = str(exported.graph)
    lowered(exported)
    assert str(exported.graph) == before
    exported.validate()


class Two(nn.Module):
    """Two buffers that the cases below write."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(4))
        self.register_buffer("b", torch.full((4,), 0.5))


def case(function):
    """A module whose forward is the function of (module, x)."""
    return type(function.__name__, (Two,), {"forward": function})


def reads_old_later(m, x):
    old = m.a.clone()
    m.a.add_(x)
    return old * m.a


def returns_old(m, x):
    old = m.a.clone()
    m.a.add_(x)
    return old


def returns_a_view_of_old(m, x):
    old = m.a.clone().view(2, 2)
    m.a.copy_(x)
    return old


def returns_old_times_one(m, x):
    old = m.a * 1
    m.a.copy_(x)
    return old


def reads_a_part_of_old_later(m, x):
    first, _ = (m.a * 1).split(2)
    m.a.index_copy_(0, torch.tensor([0, 1]), x[:2])
    return first * m.a[:2]


def returns_new(m, x):
    m.a.add_(x)
    return m.a


def returns_a_view_of_new(m, x):
    m.a.add_(x)
    return m.a.view(2, 2), m.a[1:3]


def returns_what_was_stored(m, x):
    m.a.copy_(x)
    return m.a


def swaps(m, x):
    old = m.a.clone()
    m.a.copy_(m.b)
    m.b.copy_(old + x)
    return m.a + 1


def passes_on(m, x):
    m.b.copy_(m.a)
    m.a.copy_(x)
    return m.a + m.b


def passes_on_from_the_later_buffer(m, x):
    m.a.copy_(m.b)
    m.b.copy_(x)
    return m.a - m.b


def stores_equal_values(m, x):
    m.a.copy_(x.cos())
    m.b.copy_(x.cos())
    return m.a + m.b


def shifts_within_itself(m, x):
    m.a.index_copy_(0, torch.tensor([1, 2, 3]), m.a[:3].clone())
    m.a.index_copy_(0, torch.tensor([0]), x[:1])
    return m.a.sum()


def source_is_a_view_of_the_target(m, x):
    m.a.add_(x)
    m.b.index_copy_(0, torch.tensor([1, 2, 3]), m.b[:3] * 1)
    return m.b + m.a


def turns_itself(m, x):
    m.a.add_(x)
    m.b.copy_(m.b.view(2, 2).t().reshape(4) + m.a)
    return m.b * 2


def writes_several_times(m, x):
    m.a.add_(x)
    m.a.index_copy_(0, torch.tensor([1]), x[:1])
    m.a.mul_(2)
    return m.a.cos()


def scatters(m, x):
    m.a.scatter_(0, torch.tensor([3, 0]), x[:2])
    m.b[1:3] = x[1:3]
    return m.a + m.b


def writes_from_a_returned_value(m, x):
    y = x + 1
    m.a.copy_(y)
    return y


def returns_a_buffer_that_is_not_written(m, x):
    m.a.add_(x)
    return m.b.view(2, 2) + 0


CASES = [
    reads_old_later,
    returns_old,
    returns_a_view_of_old,
    returns_old_times_one,
    reads_a_part_of_old_later,
    returns_new,
    returns_a_view_of_new,
    returns_what_was_stored,
    swaps,
    passes_on,
    passes_on_from_the_later_buffer,
    stores_equal_values,
    shifts_within_itself,
    source_is_a_view_of_the_target,
    turns_itself,
    writes_several_times,
    scatters,
    writes_from_a_returned_value,
    returns_a_buffer_that_is_not_written,
]


@pytest.mark.parametrize("canonical", [True, False], ids=["canonical", "exported"])
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_calls_return_and_keep_what_the_model_does(function, canonical) -> None:
    model = case(function)()
    exported = functional(case(function)(), torch.arange(4.0))
    if canonical:
        canonicalize(exported)
    module = lowered(exported)
    expected, got = [], []
    for call in range(1, 5):
        x = torch.arange(4.0) + 10 * call
        result, outputs = model(x.clone()), module(x.clone())
        expected.append([value.clone() for value in (result if isinstance(result, tuple) else (result,))])
        # Not cloned: what a call has returned must not change with the next one.
        got.append(list(outputs))
        for name in ("a", "b"):
            if name in exported.state_dict:
                assert torch.equal(exported.state_dict[name], getattr(model, name)), f"{name} after call {call}"
    for call, (left, right) in enumerate(zip(expected, got, strict=True)):
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b), f"call {call} returned {b}, the model {a}"


@pytest.mark.parametrize("function", [reads_old_later, returns_old, returns_a_view_of_old], ids=lambda f: f.__name__)
def test_a_write_waits_where_the_old_contents_are_still_needed(function) -> None:
    exported = functional(case(function)(), torch.arange(4.0))
    canonicalize(exported)
    found = operators(lowered(exported))
    assert "add_" not in found or found.index("add_") > found.index("clone")
    assert found[-1] == "copy_" or "add_" in found


@pytest.mark.parametrize("function", [returns_new, returns_a_view_of_new], ids=lambda f: f.__name__)
def test_returned_state_is_cloned(function) -> None:
    exported = functional(case(function)(), torch.arange(4.0))
    canonicalize(exported)
    module = lowered(exported)
    assert "add_" in operators(module)
    assert operators(module).count("clone") == len(exported.graph_signature.user_outputs)
    held = exported.state_dict["a"].untyped_storage().data_ptr()
    assert all(value.untyped_storage().data_ptr() != held for value in module(torch.ones(4)))


def test_an_input_that_the_model_writes_is_written() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return x * 2

    exported = functional(Writes(), torch.zeros(3))
    canonicalize(exported)
    x = torch.zeros(3)
    (y,) = lowered(exported)(x)
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(y, torch.full((3,), 2.0))


def test_phases_write_the_same_tensors() -> None:
    exported = functional(Cache(), torch.randn(2, 4), torch.tensor([0, 1]))
    canonicalize(exported)
    first, second = lowered(exported), lowered(copy_exported(exported))
    first(torch.ones(2, 4), torch.tensor([0, 1]))
    (total,) = second(torch.ones(2, 4), torch.tensor([2, 3]))
    assert torch.equal(total, torch.full((4,), 4.0))


def test_constants_and_weights_are_used_not_copied() -> None:
    model = nn.Linear(4, 4)
    exported = functional(model, torch.randn(2, 4))
    module = lowered(exported)
    stored = {tensor.data_ptr() for tensor in exported.state_dict.values()}
    assert {buffer.data_ptr() for buffer in module.buffers()} == stored
    assert not any(buffer.requires_grad for buffer in module.buffers())
