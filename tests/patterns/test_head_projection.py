"""Which rows of a linear make which head, in whatever order they lie, and why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn import functional as F

from graphwright.patterns.graph import GraphView, Refusal
from graphwright.patterns.head_projection import HeadProjection, head_projection
from graphwright.patterns.nodes import arguments, aten, is_call

WIDTH, HEADS, SIZE = 32, 4, 8


class Fused(nn.Module):
    """Attention over operands that are cut out of one linear."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.linear = cut, nn.Linear(WIDTH, 3 * WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.cut(self.linear(x)))


def projections(module: nn.Module) -> tuple[HeadProjection | Refusal, HeadProjection | Refusal, GraphView, Tensor]:
    """Of query and key, the view, and the query of an input."""
    sizes = ({1: Dim("tokens", min=2, max=64)},)
    program = export(module.eval(), (torch.randn(2, 6, WIDTH),), dynamic_shapes=sizes, strict=False)
    view = GraphView(program.run_decompositions({}))
    (node,) = [node for node in view.graph.nodes if is_call(node, aten.scaled_dot_product_attention.default)]
    args = arguments(node)
    return head_projection(view, args["query"]), head_projection(view, args["key"]), view, args["query"]


def by_head(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bloom: query, key and value of a head lie together."""
    q, k, v = x.view(*x.shape[:2], HEADS, 3, SIZE).unbind(3)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def by_operand(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for part in x.split(WIDTH, -1))
    return q, k, v


def interleaved(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.view(*x.shape[:2], SIZE, HEADS).permute(0, 3, 1, 2) for part in x.split(WIDTH, -1))
    return q, k, v


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cut", [by_head, interleaved, by_operand])
def test_every_layout(cut, bias):
    module = Fused(cut, bias)
    query, key, _, _ = projections(module)
    x = torch.randn(2, 5, WIDTH)
    for found, wanted in zip((query, key), module.cut(module.linear(x)), strict=False):
        assert isinstance(found, HeadProjection), found
        assert (found.bias is not None) == bias
        weight = module.linear.weight[found.rows]
        made = torch.einsum("btc,hdc->bhtd", x, weight)
        if bias:
            made = made + module.linear.bias[found.rows][:, None]
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)


def rotated(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = by_operand(x)
    return q * torch.arange(x.shape[1])[:, None], k, v


def other_order(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = by_operand(x)
    return q.flatten(1, 2).view(2, -1, HEADS, SIZE).transpose(1, 2), k, v


class Computed(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.cut(F.linear(x, self.linear.weight * x.mean())))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Fused(rotated), "heads are changed after their projection"),
        (Fused(other_order), "tokens are reordered after their projection"),
        (Computed(by_head), "the projection's weight is computed"),
    ],
    ids=["rotated", "reordered", "computed"],
)
def test_near_misses(module, reason):
    found = projections(module)[0]
    assert isinstance(found, Refusal)
    assert reason in found.reason
