"""The order in which passes run, and that no broken invariant goes by unnamed."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphwright.errors import InvalidArgument, VerificationError
from graphwright.passes.base import Pass, PassResult
from graphwright.passes.edit import Edit
from graphwright.passes.manager import PassManager
from tests.graph_text import functional

aten = torch.ops.aten


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cos() + 1


def program() -> ExportedProgram:
    return functional(Model(), torch.randn(3, 4))


def calls(edit: Edit, name: str):
    return [node for node in edit.graph.nodes if node.op == "call_function" and name in str(node.target)]


def nothing(pass_name: str, needs: tuple[str, ...] = ()) -> Pass:
    """A pass that changes nothing."""

    @dataclass(frozen=True)
    class Nothing(Pass):
        name = pass_name
        after = needs

        def run(self, edit: Edit) -> PassResult:
            return PassResult(0)

    return Nothing()


def order(*passes: Pass) -> list[str]:
    return [step.name for step in PassManager(passes).passes]


def test_the_given_order_is_kept_where_nothing_else_is_asked_for() -> None:
    assert order(nothing("test_c"), nothing("test_a"), nothing("test_b")) == ["test_c", "test_a", "test_b"]


def test_declared_needs_come_first() -> None:
    last, middle, first = nothing("test_z", ("test_y",)), nothing("test_y", ("test_x",)), nothing("test_x")
    assert order(last, middle, first) == ["test_x", "test_y", "test_z"]
    other = nothing("test_w")
    assert order(last, other, middle, first) == ["test_w", "test_x", "test_y", "test_z"]


def test_needs_that_are_not_there_do_not_count() -> None:
    assert order(nothing("test_b", ("test_absent",)), nothing("test_a")) == ["test_b", "test_a"]


def test_a_circle_is_named() -> None:
    circle = [nothing("test_a", ("test_c",)), nothing("test_b", ("test_a",)), nothing("test_c", ("test_b",))]
    with pytest.raises(InvalidArgument, match="circle") as raised:
        PassManager([nothing("test_d"), *circle])
    assert all(name in str(raised.value) for name in ("test_a", "test_b", "test_c"))
    assert "test_d" not in str(raised.value)


@dataclass(frozen=True)
class WrongNumbers(Pass):
    name: ClassVar[str] = "test_wrong_numbers"

    def run(self, edit: Edit) -> PassResult:
        (cos,) = calls(edit, "cos")
        edit.replace(cos, edit.call(aten.sin.default, cos.args[0], like=cos))
        return PassResult(1)


@dataclass(frozen=True)
class Lossy(WrongNumbers):
    name: ClassVar[str] = "test_lossy"
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class WrongDialect(Pass):
    name: ClassVar[str] = "test_wrong_dialect"

    def run(self, edit: Edit) -> PassResult:
        (add,) = calls(edit, "add")
        edit.replace(add, edit.call(aten.dropout.default, add, 0.0, False, like=add, before=add.next))
        return PassResult(1)


@dataclass(frozen=True)
class Mutating(Pass):
    name: ClassVar[str] = "test_mutating"
    ensures: ClassVar[str] = "exported"

    def run(self, edit: Edit) -> PassResult:
        (add,) = calls(edit, "add")
        edit.replace(add, edit.call(aten.add_.Tensor, add.args[0], 1, like=add))
        return PassResult(1)


@dataclass(frozen=True)
class WrongMetadata(Pass):
    name: ClassVar[str] = "test_wrong_metadata"

    def run(self, edit: Edit) -> PassResult:
        (cos,) = calls(edit, "cos")
        node = edit.call(aten.cos.default, cos.args[0], like=cos)
        node.meta["val"] = node.meta["val"].to(torch.float16)
        edit.replace(cos, node)
        return PassResult(1)


@dataclass(frozen=True)
class WrongOrder(Pass):
    name: ClassVar[str] = "test_wrong_order"

    def run(self, edit: Edit) -> PassResult:
        (cos,) = calls(edit, "cos")
        (add,) = calls(edit, "add")
        edit.replace(cos, edit.call(aten.cos.default, cos.args[0], like=cos, before=add.next))
        return PassResult(1)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (WrongNumbers(), "outputs differ by"),
        (WrongDialect(), "breaks the rule of canonical: is no dropout"),
        (Mutating(), "breaks the rule of exported: is functional"),
        (WrongMetadata(), "in the metadata"),
        (WrongOrder(), "used before it has been defined"),
    ],
    ids=lambda value: value.name if isinstance(value, Pass) else "",
)
def test_a_broken_invariant_names_pass_phase_and_those_before(step, reason) -> None:
    with pytest.raises(VerificationError) as raised:
        PassManager([nothing("test_before"), step]).run(program(), "decode")
    message = str(raised.value)
    assert message.startswith(f"decode: after {step.name}: ")
    assert reason in message
    assert "(passes before: test_before)" in message


def test_lossy_passes_and_switched_off_checks_are_not_compared() -> None:
    (record,) = PassManager([Lossy()]).run(program())
    assert (record.changed, record.difference) == (1, None)
    (record,) = PassManager([WrongNumbers()], check_numbers=False).run(program())
    assert record.difference is None


def test_the_callback_sees_every_pass_and_the_program_after_it() -> None:
    seen = []
    manager = PassManager(
        [nothing("test_first"), Lossy(), nothing("test_last")],
        on_pass=lambda record, exported: seen.append((record, [str(n.target) for n in exported.graph.nodes])),
    )
    records = manager.run(program(), "prefill")
    assert [record for record, _ in seen] == records
    assert [(record.name, record.phase, record.changed) for record, _ in seen] == [
        ("test_first", "prefill", 0),
        ("test_lossy", "prefill", 1),
        ("test_last", "prefill", 0),
    ]
    assert ["aten.sin.default" in targets for _, targets in seen] == [False, True, True]
    assert all(record.seconds >= 0 and record.nodes_before == record.nodes_after == 4 for record in records)
