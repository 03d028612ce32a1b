"""Sparse weights in the place of dense ones: what stands in the graph, and the guards."""

from __future__ import annotations

import re

import pytest
import torch

from graphwright.kernels.bitmask_weights import compress
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import run_functional
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from tests.graph_text import functional

X = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(12, 20, generator=torch.Generator().manual_seed(2)) * (torch.arange(20) % 2)


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    made = functional(torch.nn.Linear(20, 12), X)
    canonicalize(made)
    return made


def rewritten(exported, tensors, **options):
    copy = copy_exported(exported)
    (site,) = find_sites(GraphView(exported)).linear
    decision = Decision(site=site.id, method="t", pass_name="merge_sparse_adapters", options=options, reason="")
    rewriting = apply_decisions(copy, "main", [decision], tensors)
    rewriting.commit()
    return copy, rewriting.failed.get(site.id)


def stored(weight: torch.Tensor = WEIGHT, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"w.{name}": part for name, part in {**compress(weight)._asdict(), **changes}.items()}


@pytest.mark.parametrize(
    ("form", "called"), [("compressed", "graphwright.bitmask_linear.default"), ("dense", "aten.linear.default")]
)
def test_the_sparse_weight_is_read(exported, form, called):
    copy, failed = rewritten(exported, stored(), weight="w", form=form)
    assert failed is None
    assert [str(node.target) for node in copy.graph.nodes if node.op == "call_function"] == [called]
    wanted = torch.nn.functional.linear(X, WEIGHT, exported.state_dict["bias"])
    # Sums of 10 products in another order.
    torch.testing.assert_close(run_functional(copy, [X])[0], wanted, rtol=0, atol=20 * 2**-23)
    assert "weight" not in copy.state_dict


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        ({}, {"weight": "w"}, "the profile has no weight 'w'"),
        (stored(WEIGHT[:5]), {"weight": "w"}, r"bits are torch.uint8\[5, 3\], expected torch.uint8\[12, 3\]"),
        (stored(WEIGHT.half()), {"weight": "w"}, "w is of torch.float16, the program's weight of torch.float32"),
        (stored(values=torch.ones(3)), {"weight": "w"}, "do not count the same"),
        (stored(), {"weight": "w", "form": "csr"}, "got form 'csr'"),
    ],
)
def test_the_guard_says_why_not(exported, tensors, options, reason):
    copy, failed = rewritten(exported, tensors, **options)
    assert re.search(reason, failed or "")
    assert "weight" in copy.state_dict


def test_a_quantized_weight_is_refused():
    class Quantized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Buffer(torch.ones(12, 20, dtype=torch.int32))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight)

    made = functional(Quantized(), X.int())
    canonicalize(made)
    _, failed = rewritten(made, stored(), weight="w")
    assert "adapters are merged before weights are quantized, got a weight of torch.int32" in (failed or "")
