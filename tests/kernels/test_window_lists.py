"""The lists against the definition of the mask, over chunks and devices; refusals; exported graphs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import window_lists as module
from graphwright.kernels.contract import OPERATORS
from graphwright.kernels.window_lists import reference, window_lists


def brute_force(windows, group, tiles):
    """For each head and query tile, the key tiles that the definition keeps."""
    coordinates = list(itertools.product(*map(range, tiles)))
    lists = []
    for head in windows.tolist():
        rows = []
        for pt, ph, pw in coordinates:
            row = []
            for index, (rt, rh, rw) in enumerate(coordinates):
                outer_w, inner_h, inner_w, outer_h = head[group[min(abs(rt - pt), len(group) - 1)]]
                dh, dw = abs(rh - ph), abs(rw - pw)
                if (dw <= outer_w and dh <= inner_h) or (dw <= inner_w and dh <= outer_h):
                    row.append(index)
            rows.append(row)
        lists.append(rows)
    return lists


def assert_lists(result, expected, tiles):
    counts, blocks = result
    tile_count = math.prod(tiles)
    assert (counts.dtype, blocks.dtype) == (torch.int32, torch.int32)
    assert counts.shape == (len(expected), tile_count)
    assert blocks.shape == (len(expected), tile_count, tile_count)
    for head, (head_counts, head_blocks) in enumerate(zip(counts.tolist(), blocks.tolist(), strict=True)):
        kept = [row[:count] for row, count in zip(head_blocks, head_counts, strict=True)]
        assert kept == expected[head]
    # What stands behind is a block as well: a kernel that loads it ahead reads nothing foreign.
    assert ((blocks >= 0) & (blocks < tile_count)).all()


def make_windows(heads, groups, largest=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, largest, (heads, groups, 4), dtype=torch.int32, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    tiles=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    data=st.data(),
    entries=st.sampled_from([1, 30, 1 << 20]),
    seed=st.integers(0, 2**31),
)
def test_lists_are_the_mask_of_the_definition(tiles, heads, groups, data, entries, seed):
    group = data.draw(st.lists(st.integers(0, groups - 1), min_size=1, max_size=6))
    windows = make_windows(heads, groups, seed=seed)
    args = windows, torch.tensor(group, dtype=torch.int32)
    expected = brute_force(windows, group, tiles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ENTRIES", entries)  # a row at a time, a few, or all
        assert_lists(window_lists(*args, tiles=tiles), expected, tiles)
    assert_lists(reference(*args, tiles=tiles), expected, tiles)


def test_known_lists():
    """All, nothing, the own frame, a cross, and neighbours in time without the own frame."""
    full, none = [9, 9, 9, 9], [-1, -1, -1, -1]
    cross = [9, 0, 0, 9]
    windows = [[full, full], [none, none], [full, none], [cross, none], [none, full]]
    tiles = (3, 3, 3)
    counts, blocks = window_lists(torch.tensor(windows).int(), torch.tensor([0, 1]).int(), tiles=tiles)
    assert (counts[0] == 27).all()
    assert torch.equal(blocks[0], torch.arange(27).expand(27, -1).int())
    assert (counts[1] == 0).all()
    assert (counts[2] == 9).all()
    assert blocks[2, 13, :9].tolist() == list(range(9, 18))
    assert (counts[3] == 5).all()
    assert blocks[3, 13, :5].tolist() == [10, 12, 13, 14, 16]
    assert (counts[4] == 18).all()
    assert blocks[4, 13, :18].tolist() == [*range(9), *range(18, 27)]


def test_any_strides_no_heads_and_inputs_left_alone():
    windows, group = make_windows(3, 2), torch.tensor([1, 0], dtype=torch.int32)
    before = windows.clone(), group.clone()
    expected = brute_force(windows, [1, 0], (2, 2, 3))
    apart = windows.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_lists(window_lists(apart, group.repeat_interleave(2)[::2], tiles=(2, 2, 3)), expected, (2, 2, 3))
    assert torch.equal(windows, before[0])
    assert torch.equal(group, before[1])
    counts, blocks = window_lists(windows[:0], group, tiles=(2, 2, 3))
    assert (counts.shape, blocks.shape) == ((0, 12), (0, 12, 12))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"windows": torch.zeros(2, 3, 4)}, "got windows of torch.float32, expected torch.int32"),
        ({"windows": torch.zeros(2, 3, 3).int()}, "got sides=3 in windows, expected one of 4"),
        ({"windows": torch.zeros(2, 0, 4).int()}, "got G=0 in windows, expected at least 1"),
        ({"group": torch.zeros(0).int()}, "got K=0 in group, expected at least 1"),
        ({"group": torch.zeros(1, 2).int()}, r"got group of shape \[1, 2\], expected \[K\]"),
        ({"tiles": [2, 0, 2]}, "got tiles in a column=0, expected at least 1"),
        ({"tiles": [2, 2]}, "got 2 sizes of the grid of tiles, expected 3"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_the_contract_does_not_hold(change, reason, device):
    good = {"windows": torch.zeros(2, 3, 4).int(), "group": torch.zeros(2).int(), "tiles": [2, 2, 2]}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(InvalidArgument, match=f"^window_lists: {reason}"):
        window_lists(**arguments)


def test_opcheck():
    torch.library.opcheck(window_lists, (make_windows(2, 3), torch.tensor([0, 2]).int()), {"tiles": [2, 2, 3]})


class _Lists(torch.nn.Module):
    def forward(self, windows, group, video):
        return window_lists(windows, group, tiles=[video.shape[0], video.shape[1], video.shape[2] // 2])


def test_export_keeps_one_node_and_a_grid_that_grows():
    auto = torch.export.Dim.AUTO
    group = torch.tensor([0, 1, 2], dtype=torch.int32)
    shapes = {"windows": {0: auto}, "group": None, "video": {0: auto, 1: auto, 2: auto}}
    args = make_windows(2, 3), group, torch.zeros(2, 3, 6)
    program = torch.export.export(_Lists(), args, dynamic_shapes=shapes, strict=False).run_decompositions({})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(OPERATORS["window_lists"].overload) == 1
    for tiles in ((5, 2, 2), (7, 1, 3)):  # more frames than groups: the last group holds them
        windows = make_windows(3, 3, seed=1)
        result = program.module()(windows, group, torch.zeros(*tiles[:2], tiles[2] * 2))
        assert_lists(result, brute_force(windows, [0, 1, 2], tiles), tiles)


def test_other_devices_get_the_missing_kernel_error():
    with pytest.raises(MissingKernel, match="graphwright::window_lists has no kernel for device 'cpu'"):
        module.window_lists._init_fn(make_windows(1, 1), torch.zeros(1).int(), tiles=[1, 1, 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    windows, group = make_windows(24, 6, 7), torch.tensor([0, 1, 2, 3, 4, 4, 5], dtype=torch.int32)
    expected = window_lists(windows, group, tiles=[11, 6, 10])
    result = window_lists(windows.cuda(), group.cuda(), tiles=[11, 6, 10])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(result, expected, strict=True))
