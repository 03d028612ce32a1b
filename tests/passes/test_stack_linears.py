"""Quantized linears of one input become one, in all phases alike or in none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import run_functional
from graphwright.passes.manager import PassManager
from graphwright.passes.rewrite import apply_decisions
from graphwright.passes.stack_linears import StackLinears, common_stacks
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from tests.graph_text import check_text, functional, operators


class Block(nn.Module):
    """Three linears read `x`, one reads `x + 1`; `widths` are their output channels."""

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 64), bias: tuple[bool, bool, bool] = (True,) * 3):
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(32, n, bias=b) for n, b in zip(widths, bias, strict=True))
        self.other = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (*(linear(x) for linear in self.linears), self.other(x + 1))


X = torch.randn(2, 9, 32)
INT8 = {"pass_name": "quantize_linear"}
INT4 = {"pass_name": "quantize_linear_int4", "options": {"group": 32, "activation_bits": 8}}
WEIGHT_ONLY = {"pass_name": "quantize_linear_int4", "options": {"group": 32, "activation_bits": 16}}


def quantized(model: nn.Module, how: dict, leave: tuple[str, ...] = ()) -> ExportedProgram:
    exported = functional(model, X)
    sites = find_sites(GraphView(exported)).linear
    decisions = [Decision(site=site.id, method="t", **how) for site in sites if site.module_path not in leave]
    rewriting = apply_decisions(exported, "main", decisions, {})
    rewriting.commit()
    assert not rewriting.failed
    return exported


def stacked(exported: ExportedProgram, shared: dict[str, Tensor] | None = None) -> ExportedProgram:
    copy = copy_exported(exported)
    PassManager([StackLinears(common_stacks([copy]))]).run(copy, shared=shared)
    return copy


@pytest.mark.parametrize("how", [INT8, INT4, WEIGHT_ONLY], ids=["int8", "int4", "weight only"])
def test_linears_of_one_input_are_one_and_give_the_same_numbers(how: dict) -> None:
    before = quantized(Block(), how)
    after = stacked(before)
    name = "int8_linear" if how is INT8 else "int4_linear" if how is INT4 else "int4_weight_linear"
    assert [op.split(".")[-1] for op in operators(after)].count("slice") == 3
    assert sum(name in op or op == "graphwright" for op in operators(after)) == 2
    for one, two in zip(run_functional(before, [X]), run_functional(after, [X]), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6 if how is WEIGHT_ONLY else 0)
    # Nothing is stored twice.
    assert sum(t.nbytes for t in after.state_dict.values()) == sum(t.nbytes for t in before.state_dict.values())


def test_the_graph_text() -> None:
    check_text(
        stacked(quantized(Block(), INT8)),
        """
        CHECK: %[[Y:.*]]: float32[2, 9, 256] = graphwright.int8_linear.default(
        CHECK-NEXT: aten.slice.Tensor(%[[Y]], -1, 0, 64)
        CHECK-NEXT: aten.slice.Tensor(%[[Y]], -1, 64, 192)
        CHECK-NEXT: aten.slice.Tensor(%[[Y]], -1, 192, 256)
        """,
    )


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (Block(widths=(60, 40, 64)), INT4),  # blocks of 64 channels would not be whole
        (Block(bias=(True, False, True)), INT8),  # two of them still are alike
    ],
    ids=["blocks", "bias"],
)
def test_what_differs_is_not_stacked(model: nn.Module, how: dict) -> None:
    before = quantized(model, how)
    stacks = common_stacks([before])
    assert all(len(stack) == 2 for stack in stacks)
    assert len(stacks) == (how is INT8)
    for one, two in zip(run_functional(before, [X]), run_functional(stacked(before), [X]), strict=True):
        assert torch.equal(one, two)


def test_phases_stack_alike_or_not_at_all() -> None:
    """A phase that keeps one of the linears in floating point would hold the weights of the others twice."""
    model = Block()
    both, fewer = quantized(model, INT8), quantized(model, INT8, leave=("linears.0",))
    assert len(common_stacks([both])) == 1
    assert common_stacks([both, both]) == common_stacks([both])
    assert common_stacks([both, fewer]) == ()


def test_phases_share_what_is_stacked() -> None:
    shared: dict[str, Tensor] = {}
    first = quantized(Block(), INT8)
    one, two = stacked(first, shared), stacked(first, shared)
    weights = [next(t for name, t in program.state_dict.items() if ".stack." in name) for program in (one, two)]
    assert weights[0].data_ptr() == weights[1].data_ptr()
