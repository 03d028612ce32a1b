"""Scales folded into producers and readers: nothing changes but the rounding, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import run_functional
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from tests.graph_text import functional as exported_of


class Block(torch.nn.Module):
    """A norm, a gated product behind it, and the projection that reads that."""

    def __init__(self, norm: str = "rms", also: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.RMSNorm(16) if norm == "rms" else torch.nn.LayerNorm(16)
        torch.nn.init.uniform_(self.norm.weight, 0.5, 2)
        self.gate, self.up = torch.nn.Linear(16, 24), torch.nn.Linear(16, 24)
        self.down = torch.nn.Linear(24, 16)
        self.also = also

    def forward(self, x):
        h = self.norm(x)
        up = self.up(h)
        product = functional.silu(self.gate(h)) * up
        y = self.down(product)
        extra = {"norm": h, "up": up, "product": product}
        return (y, extra[self.also] + 1) if self.also else y


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
SCALES = {"h": torch.rand(16) + 0.3, "p": torch.rand(24) * 4 + 0.1, "bad": torch.tensor([0.0] * 16)}


def applied(model: torch.nn.Module, names: dict[str, str]):
    """The program with the passes that `names` maps to scales, and what failed."""
    program = exported_of(model.eval(), X)
    canonicalize(program)
    sites = find_sites(GraphView(program))
    decisions = []
    for name, scale in names.items():
        found = sites.norm[0] if name == "widen_norm" else sites.linear[-1]
        decisions.append(Decision(site=found.id, method="t", pass_name=name, options={"scale": scale}, reason=""))
    copy = copy_exported(program)
    rewriting = apply_decisions(copy, "main", decisions, dict(SCALES))
    rewriting.commit()
    return program, copy, rewriting.failed


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(
    "names",
    [
        {"widen_norm": "h"},
        {"widen_up": "p"},
        {"widen_norm": "h", "widen_up": "p"},
        {"widen_up": "p", "widen_norm": "h"},
    ],
    ids=lambda names: "+".join(names),
)
def test_outputs_stay_and_activations_widen(norm, names):
    program, copy, failed = applied(Block(norm), names)
    assert not failed
    (before,), (after,) = run_functional(program, [X]), run_functional(copy, [X])
    # Two linears of at most 24 terms, each rounded as before, from weights and gains that were rounded once more.
    torch.testing.assert_close(after, before, rtol=0, atol=60 * 2**-24 * float(before.abs().max()))
    assert len(copy.graph.nodes) == len(program.graph.nodes)
    down = next(s for s in find_sites(GraphView(copy)).linear if s.role == "down")
    weight = copy.state_dict[down.weight_name]
    scale = SCALES["p"] if "widen_up" in names else torch.ones(24)
    torch.testing.assert_close(weight * scale, dict(program.state_dict)["down.weight"])


@pytest.mark.parametrize(
    ("also", "names", "reason"),
    [
        ("norm", {"widen_norm": "h"}, "read by something that is no linear"),
        ("up", {"widen_up": "p"}, "no factor of its input"),
        ("product", {"widen_up": "p"}, "something else reads its input"),
        ("", {"widen_up": "h"}, r"h is torch.float32\[16\], expected a float tensor \[24\]"),
        ("", {"widen_norm": "missing"}, "the profile has no tensor missing"),
        ("", {"widen_norm": "bad"}, "bad is not positive"),
    ],
)
def test_refuses(also, names, reason):
    import re

    program, copy, failed = applied(Block(also=also), names)
    assert re.search(reason, " ".join(failed.values()))
    assert len(copy.graph.nodes) == len(program.graph.nodes)


def test_an_input_that_is_no_gated_product_is_refused():
    class Plain(Block):
        def forward(self, x):
            return self.down(functional.gelu(self.up(self.norm(x))))

    _, _, failed = applied(Plain(), {"widen_up": "p"})
    assert "its input is no gated product" in " ".join(failed.values())
