"""RainFusion's head patterns: bands in the right order, textural keys, densities, and the protected rest."""

from __future__ import annotations

import pytest
import torch

from graphwright.errors import InvalidArgument
from graphwright.kernels.block_lists import density, keep_of
from graphwright.kernels.head_patterns import bandwidth_of, head_patterns, row_names, tau_of


def test_bandwidth_and_tau_are_those_of_the_published_code():
    assert [bandwidth_of(s) for s in (0.5, 0.64, 0.5625)] == [0.29, 0.2, 0.25]
    assert [tau_of(s) for s in (0.5, 0.64, 0.75)] == [2, 3, 4]


def test_rows_are_bands_in_their_orders_and_textural_keys():
    orders, counts, blocks = head_patterns(5, 16, 16, first=3, text=7, block_size=64, bandwidths=(0.25, 0.5), tau=2)
    assert row_names(2) == ("temporal 1", "temporal 2", "spatial 1", "spatial 2", "textural")
    assert orders.shape == (5, 5 * 256 + 7)
    size = 4 * 256 // 64
    keep = keep_of(counts, blocks, size)
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    for row, width in ((0, 0.25), (1, 0.5), (2, 0.25), (3, 0.5)):
        assert torch.equal(keep[row], distance <= int(width * size))
    assert keep[4].all(0)[: size // 2].all()
    assert not keep[4][:, size // 2 :].any()
    for order in orders:
        assert sorted(order.tolist()) == list(range(5 * 256 + 7))
        assert order[size * 64 :].tolist() == [*range(3, 259), 0, 1, 2, 1283, 1284, 1285, 1286]
    assert orders[0, :4].tolist() == [3 + 256, 3 + 512, 3 + 768, 3 + 1024]  # one place, frame after frame
    sampled = (orders[4, : size * 32] - 3) % 256
    assert ((sampled // 16 - sampled % 16) % 2 == 0).all()


def test_density_falls_to_what_the_sparsity_asks_for_on_a_large_grid():
    sparsity, (frames, height, width) = 0.5, (33, 48, 80)
    tokens, rest = frames * height * width, (frames - 1) * height * width
    _, counts, _ = head_patterns(
        frames, height, width, first=0, text=0, block_size=128,
        bandwidths=(bandwidth_of(sparsity),), tau=tau_of(sparsity),
    )  # fmt: skip
    frame = 1 / frames  # always computed, as rows and as columns
    protected = 2 * frame - frame**2
    for row in counts:
        found = density(row[None], rest // 128, tokens, tokens, 128)
        assert found == pytest.approx(protected + (1 - frame) ** 2 * (1 - sparsity), abs=0.01)


def test_the_operator_gives_the_same_and_its_fake_the_shape():
    arguments = (torch.randn(1), 3, 8, 12, 2, 5, 64, [0.29], 2)
    torch.library.opcheck(torch.ops.graphwright.head_patterns.default, arguments)
    expected = head_patterns(3, 8, 12, first=2, text=5, block_size=64, bandwidths=(0.29,), tau=2)
    for got, wanted in zip(torch.ops.graphwright.head_patterns(*arguments), expected, strict=True):
        assert torch.equal(got, wanted)


def test_less_than_a_block_after_the_first_frame_is_refused():
    with pytest.raises(InvalidArgument, match="got 2 frames of 4 x 4 tokens, no block of 64"):
        head_patterns(2, 4, 4, first=0, text=0, block_size=64, bandwidths=(0.29,), tau=2)
