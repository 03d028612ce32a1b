"""Rotary groups are proved from the tables, and what holds none says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.patterns.attention import find_attention
from graphwright.patterns.graph import GraphView, Refusal
from graphwright.patterns.rope_groups import RopeGroup, rope_groups
from graphwright.patterns.video import video_layout
from tests.video_models import GRID, canonical

WAN = (RopeGroup("t", 12), RopeGroup("h", 10), RopeGroup("w", 10))


def groups_of(exported, grid=GRID):
    view = GraphView(exported)
    for site in find_attention(view).sites:
        layout = video_layout(view, site, grid)
        if not isinstance(layout, Refusal):
            return rope_groups(view, site, layout)
    raise AssertionError("no video attention")


def test_wan_has_its_three_groups():
    assert groups_of(canonical("wan")) == WAN


def test_hunyuan_has_the_groups_of_its_configuration():
    assert groups_of(canonical("hunyuan")) == (RopeGroup("t", 8), RopeGroup("h", 12), RopeGroup("w", 12))


@pytest.mark.parametrize("family", ["cogvideox", "cogvideox without rotary", "mochi", "ltx"])
def test_tables_that_are_handed_in_learned_or_over_all_heads_prove_nothing(family):
    found = groups_of(canonical(family))
    assert isinstance(found, Refusal)
    assert "no rotary table" in found.reason


class Rotated(nn.Module):
    """Attention of two heads whose queries are multiplied by a table [tokens, channels]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q * self.table, k * self.table, v)


def of_table(table):
    program = gw.optimize(Rotated(table).eval(), (torch.randn(1, 24, 16),), progress=False)
    return groups_of(program.phases["main"].exported, (2, 3, 4))


def test_channels_that_mix_axes_or_none_are_other():
    t, h, w = (axis.flatten()[:, None] for axis in torch.meshgrid(*map(torch.arange, (2, 3, 4)), indexing="ij"))
    table = torch.cat([t, t, h, t + w, w, torch.ones_like(t), h, h], 1).float()
    names = ["t", "h", "other", "w", "other", "h"]
    assert of_table(table) == tuple(map(RopeGroup, names, [2, 1, 1, 1, 1, 2]))
    flat = of_table(torch.ones(24, 8))
    assert isinstance(flat, Refusal)
    assert "the same for all tokens" in flat.reason


def test_a_dynamic_grid_has_no_fixed_rows():
    found = groups_of(canonical("wan", dynamic=True), (None, *GRID[1:]))
    assert isinstance(found, Refusal)
    assert "dynamic" in found.reason
