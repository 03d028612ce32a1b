"""n:m sparse inputs as a rewrite: what stands in the graph, who reads what, and the guards."""

from __future__ import annotations

import pytest
import torch

from graphwright.kernels.channel_factors import channel_factors
from graphwright.kernels.nm_sparsify import reference
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import run_functional
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from tests.graph_text import functional


class Two(torch.nn.Module):
    """Two linears that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(48, 20), torch.nn.Linear(48, 24, bias=False)

    def forward(self, x):
        return self.first(x), self.second(x)


X = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported():
    made = functional(Two(), X)
    canonicalize(made)
    return made


def rewritten(exported, shared=None, **options):
    copy = copy_exported(exported)
    first, _ = find_sites(GraphView(exported)).linear
    decision = Decision(site=first.id, method="t", pass_name="sparsify_activations", options=options, reason="")
    rewriting = apply_decisions(copy, "main", [decision], shared)
    rewriting.commit()
    return copy, rewriting.failed.get(first.id)


@pytest.mark.parametrize("scoring", ["robust_norm", "robust_all", "norm", "none"])
def test_the_sparse_tensor_feeds_its_own_linear_alone(exported, scoring):
    copy, failed = rewritten(exported, n=2, m=4, scoring=scoring)
    assert failed is None
    (select,) = [n for n in copy.graph.nodes if n.target is torch.ops.graphwright.nm_sparsify.default]
    assert [str(user.target) for user in select.users] == ["aten.linear.default"]
    dense = [n for n in copy.graph.nodes if str(n.target) == "aten.linear.default" and n.args[0] is select.args[0]]
    assert len(dense) == 1  # the other linear reads what the selection reads
    model = Two()
    factors = channel_factors(model.first.weight, scoring)
    first, second = run_functional(copy, [X])
    assert torch.equal(first, model.first(reference(X, factors, 2, 4)))
    assert torch.equal(second, model.second(X))


def test_the_weight_is_shared_with_the_dense_program(exported):
    copy, _ = rewritten(exported, n=8, m=16)
    assert copy.state_dict["first.weight"] is exported.state_dict["first.weight"]


def test_given_factors_are_taken(exported):
    factors = torch.rand(48)
    copy, failed = rewritten(exported, {"f": factors}, n=1, m=8, factors="f")
    assert failed is None
    assert torch.equal(run_functional(copy, [X])[0], Two().first(reference(X, factors, 1, 8)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n": 16, "m": 32}, "got K=48 in x, expected a multiple of m=32"),
        ({"n": 9, "m": 8}, "got n=9 of m=8"),
        ({"n": 2, "m": 6}, "got m=6"),
        ({"scoring": "l1"}, "got scoring 'l1'"),
        ({"factors": "missing"}, r"missing is nothing, expected torch.float32\[48\]"),
        ({"factors": "short"}, r"short is torch.float32\[3\]"),
        ({"kernel": "sparse"}, "got kernel 'sparse'"),
        ({"n": 2, "m": 4, "kernel": "semi_structured"}, "are of CUDA devices, got cpu"),
    ],
)
def test_the_guard_says_why_not(exported, options, reason):
    import re

    copy, failed = rewritten(exported, {"short": torch.ones(3)}, **options)
    assert re.search(reason, failed or "")
    assert not any("graphwright" in str(node.target) for node in copy.graph.nodes)


def test_no_tokens_and_one_token():
    program = torch.export.export(Two(), (X,), dynamic_shapes=({0: torch.export.Dim("t", min=0, max=64)},))
    program = program.run_decompositions({})
    canonicalize(program)
    copy, _ = rewritten(program, n=2, m=4)
    for count in (0, 1):
        assert [y.shape[0] for y in run_functional(copy, [X[:count]])] == [count, count]
