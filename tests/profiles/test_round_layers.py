"""GPTAQ aims at what a linear gave before anything was rounded."""

import torch
from torch import Tensor, nn

from graphwright.kernels.int4_weights import dequantized
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.dialects import run_functional
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from graphwright.profiles.activation_samples import Precision
from graphwright.profiles.round_layers import Rounding, _correction, round_layers
from tests.graph_text import functional


class Deep(nn.Module):
    """Linears in a row with outlier channels between them, so that errors of one reach the next."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.register_buffer("gain", torch.ones(64).index_fill(0, torch.arange(0, 64, 16), 6.0))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = x + torch.relu(linear(x * self.gain))
        return x


def test_the_correction_is_the_least_squares_answer() -> None:
    """W' = W + C minimises |W X - W' X'|^2 + damp |C|^2, so its gradient there is zero."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 16, generator=generator)
    before = torch.randn(200, 16, generator=generator)
    after = before + 0.3 * torch.randn(200, 16, generator=generator)
    hessian, drift = after.t() @ after, (before - after).t() @ after
    change = _correction(weight, hessian, drift, 0.1)
    extra = 0.1 * hessian.diagonal().mean()
    gradient = ((weight + change) @ after.t() - weight @ before.t()) @ after + extra * change
    assert gradient.abs().max() < 1e-3 * (weight @ hessian).abs().max()


def test_later_layers_make_up_for_earlier_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    x, held_out = (torch.randn(1, 400, 64, generator=generator) for _ in range(2))
    exported = functional(Deep(), x)
    canonicalize(exported)
    sites = find_sites(GraphView(exported)).linear
    linears = {site: Rounding(Precision(4, 8, 64, 1.0), False, 0.01) for site in sites}
    exact = run_functional(exported, [held_out])[-1]
    errors = {}
    for original in (False, True):
        made = round_layers(exported, [[x]], linears, original=original)
        assert set(made) == {site.place for site in sites}
        model = Deep()
        with torch.no_grad():
            for index, site in enumerate(sites):
                model.linears[index].weight.copy_(dequantized(made[site.place]))
            errors[original] = float((model(held_out) - exact).norm() / exact.norm())
    assert errors[True] < 0.97 * errors[False], errors
