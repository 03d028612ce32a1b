"""Token orders: every one is a permutation, the inverse undoes it, and each puts together what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument
from graphwright.kernels.token_order import inverse, token_order

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 11), st.integers(1, 11))
KINDS = st.sampled_from(
    [("raster", ()), ("frame_last", ()), ("checkerboard", (2,)), ("checkerboard", (3,)), ("window", (4, 4)),
     ("window", ()), ("tile", (2, 2, 4)), ("tile", (1, 8, 8))]
)  # fmt: skip


@given(GRIDS, KINDS, st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_every_order_holds_every_token_once_and_round_trips(grid, kind, before, after, protect):
    frames, height, width = grid
    total = frames * height * width + before + after
    order = token_order(kind[0], *grid, first=before, text=before + after, protect_frame=protect, shape=kind[1])
    assert order.dtype is torch.int32
    held = order[order >= 0]
    assert sorted(held.tolist()) == list(range(total))
    x = torch.arange(total) * 7
    padded = torch.cat([x, torch.tensor([-1])])[order.long()]
    assert torch.equal(padded[inverse(order, total)], x)
    text = [*range(before), *range(total - after, total)]
    assert order[len(order) - len(text) :].tolist() == text
    if protect:
        frame = list(range(before, before + height * width))
        assert order[len(order) - len(text) - len(frame) : len(order) - len(text)].tolist() == frame


def test_frame_last_puts_one_place_of_all_frames_together():
    assert token_order("frame_last", 3, 1, 2).tolist() == [0, 2, 4, 1, 3, 5]


def test_checkerboard_puts_the_sampled_half_first():
    assert token_order("checkerboard", 1, 2, 4).tolist() == [0, 2, 5, 7, 1, 3, 4, 6]
    sampled = {(token // 6, token % 6) for token in token_order("checkerboard", 1, 6, 6, shape=(3,))[:12].tolist()}
    assert sampled == {(i, j) for i in range(6) for j in range(6) if i % 3 == j % 3}


def test_windows_then_the_bottom_rows_then_the_right_columns():
    order = token_order("window", 1, 3, 5, shape=(2, 2)).tolist()
    assert order == [0, 1, 5, 6, 2, 3, 7, 8, 10, 11, 12, 13, 14, 4, 9]


def test_tiles_are_padded_to_whole_ones():
    order = token_order("tile", 1, 2, 3, shape=(2, 2, 2)).tolist()
    assert order == [0, 1, 3, 4, -1, -1, -1, -1, 2, -1, 5, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("kind", ["raster", "frame_last", "checkerboard", "window", "tile"])
@pytest.mark.parametrize("protect", [False, True])
def test_the_operator_gives_the_same_and_its_fake_the_shape(kind, protect):
    shape = [2, 4, 4] if kind == "tile" else []
    arguments = (torch.randn(1), kind, 3, 5, 6, 2, 4, protect, shape)
    torch.library.opcheck(torch.ops.graphwright.token_order.default, arguments)
    expected = token_order(kind, 3, 5, 6, first=2, text=4, protect_frame=protect, shape=tuple(shape))
    assert torch.equal(torch.ops.graphwright.token_order(*arguments), expected[None])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("spiral", 1, 1, 1), "unknown token order 'spiral'; there are raster"),
        (("raster", 0, 1, 1), "got a grid of 0 x 1 x 1"),
        (("tile", 1, 1, 1), "a tile has three sizes"),
    ],
)
def test_what_is_refused(arguments, reason):
    with pytest.raises(InvalidArgument, match=reason):
        token_order(*arguments)
