"""Blocks of the families, what is inside, and near misses with the fact that failed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.patterns.block_site import find_blocks
from graphwright.patterns.graph import GraphView
from tests.tiny_wan import LAYERS, captured
from tests.video_models import canonical

TOKENS, WIDTH, HEADS = 24, 16, 2


class Block(nn.Module):
    """Norm, self-attention, norm, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm2(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(x)


def found_in(*blocks, inputs=None):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))
    program = gw.optimize(model.eval(), inputs or (torch.randn(1, TOKENS, WIDTH),), progress=False)
    return find_blocks(GraphView(program.phases["main"].exported))


def test_plain_blocks_follow_each_other():
    first, second = found_in(Block(), Block()).sites
    assert first.node is second.entry
    assert (first.tokens, first.channels, first.batch) == (TOKENS, WIDTH, 1)
    assert [str(node.args[1]) for node in first.linears] == ["p_1_up_weight", "p_1_down_weight"]
    assert first.cross == first.tables == first.modulation == ()
    assert (first.id, second.id) == ("main/block[0]", "main/block[1]")
    # The norm and the projections of keys and values are for all tokens, the queries' projection for some.
    weights = {str(node.args[1]) for node in first.full if node.target is torch.ops.aten.linear.default}
    assert weights == {"p_1_k_weight", "p_1_v_weight"}
    assert first.partial[-1] is first.node
    assert set(first.full).isdisjoint(first.partial)


def test_the_trained_wan_has_a_block_a_layer():
    found = find_blocks(GraphView(gw.optimize(captured(), progress=False).phases["main"].exported))
    assert found.refusals == ()
    assert len(found.sites) == LAYERS
    first, second = found.sites
    assert first.node is second.entry
    for site in found.sites:
        assert len(site.cross) == 1
        assert len(site.linears) == 2
        assert len(site.tables) == 2  # rotary cosines and sines
        assert site.describe()["modulation"] == "8 inputs"
        assert all(node.meta["val"].shape[dim] == 256 for node, dim in site.dims.items() if node.op != "placeholder"
                   and isinstance(node.meta["val"], Tensor))  # fmt: skip


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_families_of_one_stream(family):
    (site,) = find_blocks(GraphView(canonical(family))).sites
    assert site.tokens == 72
    assert len(site.cross) == 1


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan", "mochi", "mochi of two"])
def test_families_of_two_streams_are_refused(family):
    found = find_blocks(GraphView(canonical(family)))
    assert found.sites == ()
    assert found.refusals


def test_joint_attention_says_so():
    assert any(
        "joins two streams of tokens" in str(refusal)
        for refusal in find_blocks(GraphView(canonical("hunyuan"))).refusals
    )


class Pooled(Block):
    def forward(self, x: Tensor) -> Tensor:
        """A gate that the mean over all tokens opens: the path leaves the tokens and comes back."""
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(x) * x.mean(1, keepdim=True)


def test_a_region_that_is_not_convex():
    found = found_in(Pooled(), Block())
    (refusal,) = found.refusals
    assert "the block's region is not convex (leaves at=" in str(refusal)
    assert len(found.sites) == 1
    assert found_in(Pooled()).sites == ()


class Shifted(Block):
    def forward(self, x: Tensor) -> Tensor:
        """The MLP of a token reads its neighbour."""
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(x.roll(1, 1))


def test_an_operator_that_mixes_tokens():
    found = found_in(Block(), Shifted(), Block())
    assert len(found.sites) == 2
    (refusal,) = found.refusals
    assert "not token-wise outside its attention (operator=aten.roll.default" in str(refusal)


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        """Two attentions beside each other, as in parallel blocks."""
        y = self.norm1(x)
        return x + self.attend(y) + self.attend(y * 2)


def test_two_attentions_between_two_cuts():
    found = found_in(Block(), Twice(), Block())
    assert "two self-attentions between two cuts of the stream" in str(found.refusals[0])


class Tapped(nn.Module):
    """A block whose inside is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1.5
        inside = self.first.attend(self.first.norm1(x))
        x = x + inside
        return self.second(x + self.first.mlp(x)), inside


def test_a_second_exit():
    program = gw.optimize(Tapped().eval(), (torch.randn(1, TOKENS, WIDTH),), progress=False)
    found = find_blocks(GraphView(program.phases["main"].exported))
    assert found.sites == ()
    assert "two self-attentions between two cuts of the stream" in str(found.refusals[0])
