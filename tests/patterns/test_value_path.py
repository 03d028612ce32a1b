"""The way of values through head space: what may lie on it, and what may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphwright.passes.canonicalize import canonicalize
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView, Refusal
from graphwright.patterns.value_path import find_value_path, per_head
from tests.graph_text import functional


class Attention(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (4, 4)).transpose(1, 2)

        value = heads(self.v(x))
        value = self.norm(value) if self.change == "value norm" else value
        value = 5 * torch.tanh(value / 5) if self.change == "cap" else value
        y = nn.functional.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), value)
        joined = y.transpose(1, 2).flatten(2)
        if self.change == "other layout":
            joined = y.permute(0, 2, 3, 1).flatten(2)
        joined = joined * torch.sigmoid(self.q(x)) if self.change == "gate" else joined
        out = self.o(joined)
        return (out, value) if self.change == "values are an output" else out


def path_of(change: str):
    exported = functional(Attention(change), torch.randn(2, 5, 16))
    canonicalize(exported)
    view = GraphView(exported)
    (site,) = find_sites(view, "main").attention
    return find_value_path(view, site)


def test_the_two_linears():
    path = path_of("")
    assert not isinstance(path, Refusal)
    assert (path.kv_heads, path.heads, path.head_dim) == (4, 4, 4)
    assert path.value is not path.output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("value norm", "the values are changed in head space"),
        ("cap", "the values are changed in head space"),
        ("gate", "the output is changed in head space"),
        ("other layout", "the output's heads are laid out in another way"),
        ("values are an output", "something else reads the new keys or values"),
    ],
)
def test_refusals(change, reason):
    path = path_of(change)
    assert isinstance(path, Refusal)
    assert reason in str(path)


def test_query_heads_use_the_rotation_of_their_group():
    rotation = torch.arange(2.0)[:, None, None].expand(2, 3, 3)
    assert per_head(rotation, 6)[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
