"""Linears of 4 bits and rounded caches as rewrites: what stands in the graph, the numbers, and the guards."""

from __future__ import annotations

import pytest
import torch

from graphwright.kernels.hadamard import reference as hadamard
from graphwright.kernels.int4_linear import reference
from graphwright.kernels.int4_weights import quantize_groups
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import run_functional
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from graphwright.prepare import prepare
from tests.graph_text import functional
from tests.models import captured_llama


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(64, 40)

    def forward(self, x):
        return self.fc(x)


@pytest.fixture(scope="module")
def exported():
    made = functional(Linear(), torch.randn(12, 64))
    canonicalize(made)
    return made


def called(exported) -> list[str]:
    return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]


def rewritten(exported, shared=None, **options):
    copy = copy_exported(exported)
    (site,) = find_sites(GraphView(exported)).linear
    decision = Decision(site=site.id, method="t", pass_name="quantize_linear_int4", options=options)
    rewriting = apply_decisions(copy, "main", [decision], shared)
    rewriting.commit()
    return copy, rewriting.failed.get(site.id)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_operator_stands_where_the_linear_stood(exported, bits, rotated):
    copy, failed = rewritten(exported, group=32, activation_bits=bits, hadamard=rotated)
    assert failed is None
    assert called(copy) == ["graphwright.int4_linear.default"]
    model, x = Linear(), torch.randn(12, 64)
    weight = hadamard(model.fc.weight.detach()) if rotated else model.fc.weight.detach()
    expected = reference(x, *quantize_groups(weight, 32), model.fc.bias.detach(), bits, 1.0, rotated)
    (y,) = run_functional(copy, [x])
    assert (y - expected).norm() <= 0.02 * expected.norm()
    assert not any(name.endswith("fc.weight") for name in copy.state_dict), "the float weight is gone"


def test_weight_only(exported):
    copy, failed = rewritten(exported, group=64, activation_bits=16)
    assert failed is None
    assert called(copy) == ["graphwright.int4_weight_linear.default"]
    assert not any(name.endswith(".sums") for name in copy.state_dict)


def test_the_profile_s_weight_is_taken(exported):
    other = quantize_groups(torch.randn(40, 64, generator=torch.Generator().manual_seed(9)), 32)
    shared = {f"w.{name}": getattr(other, name) for name in other._fields}
    copy, failed = rewritten(exported, shared, group=32, weight="w")
    assert failed is None
    x = torch.randn(12, 64)
    expected = reference(x, *other, Linear().fc.bias.detach())
    assert torch.allclose(run_functional(copy, [x])[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group": 48}, "groups of 48 do not divide 64 channels; 32 or 64 does"),
        ({"activation_bits": 5}, "activations of 5 bits"),
        ({"clip": 0.0}, "clipped to 0.0"),
        ({"activation_bits": 16, "hadamard": True}, "only a quantized input is rotated"),
        ({"weight": "missing"}, "missing.packed is nothing, expected torch.uint8"),
    ],
)
def test_guards(exported, options, reason):
    copy, failed = rewritten(exported, **options)
    assert reason in failed
    assert called(copy) == ["aten.linear.default"]


def test_a_cache_is_rounded_where_it_is_written_and_read():
    prepared = prepare(captured_llama())
    for name, program in prepared.exported.items():
        copy = copy_exported(program)
        sites = prepared.sites[name].cache
        wanted = [
            Decision(site=s.id, method="t", pass_name="fake_quantize_cache", options={"group": s.head_dim})
            for s in sites
        ]
        rewriting = apply_decisions(copy, name, wanted)
        assert not rewriting.failed
        rewriting.commit()
        made = [node for node in copy.graph.nodes if "fake_quantize" in str(node.target)]
        assert len(made) == 2 * len(sites)
        after = find_sites(GraphView(copy), name).cache
        assert {node for site in after for node in (site.new_key, site.new_value)} == set(made)
    bad = Decision(site=sites[0].id, method="t", pass_name="fake_quantize_cache", options={"group": 5})
    assert "multiple of group=5" in apply_decisions(copy_exported(program), name, [bad]).failed[bad.site]
