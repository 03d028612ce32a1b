"""Bisecting names the pass or the place that was made wrong, in a logarithmic number of runs."""

from __future__ import annotations

import math
from typing import ClassVar, get_args

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.errors import InvalidArgument, StaleProfile
from graphwright.inspection.bisection import bisect
from graphwright.passes import canonicalize, drop_noops
from graphwright.passes.quantize_linear import QuantizeLinear
from graphwright.patterns.linear_roles import Role
from tests.html_report.programs import canonical, quantized
from tests.models import Mlp, captured_llama, tokens

DEEP = 12


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(DEEP))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


@pytest.fixture(scope="module")
def deep():
    model, x = Deep().eval(), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    captured = gw.capture(model, (x,))
    program = gw.optimize(captured, methods=[gw.Int8(roles=get_args(Role))], keep="smaller")
    return captured, program


def test_a_program_that_holds_needs_no_search(deep):
    captured, program = deep
    found = bisect(program, captured, tolerance=0.1)
    assert (found.kind, found.trials) == ("none", [])
    assert "holds the tolerance" in str(found)


def test_the_first_place_over_the_tolerance_is_found(deep):
    captured, program = deep
    found = bisect(program, captured, tolerance=1e-9)  # the first int8 linear is over it
    assert (found.kind, found.culprit) == ("site", "layers.0/linear[0]")
    assert found.before <= 1e-9 < found.after
    assert found.alone == found.after
    assert len(found.trials) <= 2 + math.ceil(math.log2(DEEP))
    assert "breaks it alone" in str(found)


def test_errors_that_add_up_are_told_from_one_that_is_wrong_alone(deep):
    captured, program = deep
    whole = bisect(program, captured, tolerance=1e9).error
    found = bisect(program, captured, tolerance=0.97 * whole)
    assert found.kind == "site"
    assert found.culprit != "layers.0/linear[0]"
    assert "adds up" in str(found)


def test_a_wrong_rewrite_of_one_site_is_named(deep, monkeypatch):
    captured, _ = deep
    original = QuantizeLinear.rewrite

    def wrong(self, site, edit):
        if site.module_path == "layers.7":
            after = next(iter(site.node.users))
            edit.replace(site.node, edit.call(torch.ops.aten.mul.Tensor, site.node, 3.0, like=site.node, before=after))
        else:
            original(self, site, edit)

    monkeypatch.setattr(QuantizeLinear, "rewrite", wrong)
    program = gw.optimize(captured, methods=[gw.Int8()], keep="smaller")
    found = bisect(program, captured, tolerance=0.05)
    assert (found.kind, found.culprit) == ("site", "layers.7/linear[0]")
    assert len(found.trials) <= 2 + math.ceil(math.log2(DEEP))


def test_a_wrong_exact_pass_is_named(monkeypatch):
    captured = gw.capture(Mlp().eval(), (torch.randn(4, 32),))
    program = gw.optimize(captured)
    original = drop_noops.DropNoops.run

    class Wrong(drop_noops.DropNoops):
        name: ClassVar[str] = "raise_wrongly"
        after: ClassVar[tuple[str, ...]] = ()

        def run(self, edit):
            result = original(self, edit)
            node = next(n for n in edit.graph.nodes if n.op == "call_function")
            after = next(iter(node.users))
            edit.replace(node, edit.call(torch.ops.aten.neg.default, node, like=node, before=after))
            return type(result)(result.changed + 1)

    passes = (*canonicalize.CANONICALIZERS, Wrong())
    monkeypatch.setattr(canonicalize, "CANONICALIZERS", passes)
    monkeypatch.setattr("graphwright.inspection.bisection.CANONICALIZERS", passes)
    found = bisect(program, captured, tolerance=1e-3)
    assert (found.kind, found.culprit) == ("pass", "raise_wrongly")


def test_a_program_whose_weights_were_changed_later_is_told_apart(deep):
    captured, program = deep
    changed = gw.optimize(captured, profile=program.profile)
    exported = changed.phases["main"].exported
    name = next(
        name for name in exported.state_dict if "int8" in name and exported.state_dict[name].is_floating_point()
    )
    exported.state_dict[name] = exported.state_dict[name] * 2
    found = bisect(changed, captured, tolerance=0.05)
    assert found.kind == "file"
    assert "the program was changed" in str(found)


def test_a_language_model_by_its_phases():
    found = bisect(quantized(), captured_llama(), tolerance=1e-6, inputs=[tokens(12)])
    assert found.kind == "site"
    assert "layers.0" in found.culprit
    same = bisect(quantized(), canonical(), tolerance=1e-6, inputs=[tokens(12)])
    assert same.culprit == found.culprit
    assert found.to_json()["trials"][0]["stage"] == "places"


def test_saved_programs_carry_the_inputs_that_are_run(deep, tmp_path):
    captured, program = deep
    program.save(tmp_path / "program.gw")
    gw.optimize(captured).save(tmp_path / "canonical.gw")
    found = bisect(gw.load(tmp_path / "program.gw"), gw.load(tmp_path / "canonical.gw"), tolerance=1e-9)
    assert (found.kind, found.culprit) == ("site", "layers.0/linear[0]")
    assert found.error == bisect(program, captured, tolerance=1e9).error


@pytest.mark.parametrize("tolerance", [0, -1, float("nan"), float("inf")])
def test_a_tolerance_must_be_a_positive_number(deep, tolerance):
    with pytest.raises(InvalidArgument, match="positive"):
        bisect(deep[1], deep[0], tolerance=tolerance)


def test_another_model_is_refused(deep):
    other = gw.capture(Deep().eval(), (torch.randn(5, 16),))
    with pytest.raises(StaleProfile, match="another program"):
        bisect(deep[1], other, tolerance=0.1)
    with pytest.raises(InvalidArgument, match="rewritten sites itself"):
        bisect(deep[1], deep[1], tolerance=0.1)
    with pytest.raises(InvalidArgument, match="phases"):
        bisect(deep[1], canonical(), tolerance=0.1)
