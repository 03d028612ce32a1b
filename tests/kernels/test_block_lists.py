"""Block lists: there and back, in the order that the operator wants, traced, and the density they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.kernels.block_lists import density, keep_of, lists_of


@given(shape=st.lists(st.integers(0, 5), min_size=2, max_size=4), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_there_and_back(shape, share, seed):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    counts, blocks = lists_of(keep)
    assert (counts.dtype, blocks.dtype) == (torch.int32, torch.int32)
    assert counts.shape == keep.shape[:-1]
    assert blocks.shape == keep.shape
    assert torch.equal(keep_of(counts, blocks, shape[-1]), keep)


def test_lists_are_ascending_and_filled_with_a_block_that_exists():
    keep = torch.tensor([[False, True, False, True], [False] * 4, [True] * 4])
    counts, blocks = lists_of(keep)
    assert counts.tolist() == [2, 0, 4]
    assert blocks.tolist() == [[1, 3, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]


def test_what_follows_a_list_is_ignored():
    counts, blocks = torch.tensor([[1, 0]], dtype=torch.int32), torch.full((1, 2, 3), 10**9, dtype=torch.int32)
    blocks[0, 0, 0] = 2
    assert keep_of(counts, blocks, 4).tolist() == [[[False, False, True, False], [False] * 4]]


def test_both_can_be_exported_with_dynamic_sizes():
    class Both(torch.nn.Module):
        def forward(self, keep):
            counts, blocks = lists_of(keep)
            return counts, keep_of(counts, blocks, keep.shape[-1])

    auto = torch.export.Dim.AUTO
    program = torch.export.export(Both(), (torch.ones(2, 5, 6, dtype=torch.bool),), dynamic_shapes=[(auto,) * 3])
    keep = torch.rand(3, 4, 9) < 0.5
    counts, back = program.module()(keep)
    assert torch.equal(back, keep)
    assert torch.equal(counts, keep.sum(-1).int())


@pytest.mark.parametrize(
    ("counts", "key_blocks", "queries", "keys", "expected"),
    [
        ([[2, 2]], 4, 128, 256, 0.5),
        ([[1, 3]], 4, 128, 256, 0.5),
        ([[1, 3], [4, 4]], 4, 128, 256, 0.75),
        # 32 more queries are dense, 64 more keys everybody's: (128 * (64 + 64) + 32 * 320) / (160 * 320)
        ([[1, 1]], 4, 160, 320, 0.52),
        # The second query block has 16 rows: (64 * 64 + 16 * 256) / (80 * 256)
        ([[1, 4]], 4, 80, 256, 0.4),
        # A cut last key block counts as whole, up to all keys.
        ([[1]], 1, 64, 40, 1.0),
        ([[]], 0, 100, 100, 1.0),
        ([[1]], 1, 0, 64, 1.0),
    ],
)
def test_density_counts_dense_tails(counts, key_blocks, queries, keys, expected):
    counts = torch.tensor(counts, dtype=torch.int32)
    assert density(counts, key_blocks, queries, keys, 64) == pytest.approx(expected, rel=1e-12)
