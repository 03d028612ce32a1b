"""Compact Attention's windows, expanded on the device into the lists of blocks that the sparse operator reads.

    dt, dh, dw     = |rt - pt|, |rh - ph|, |rw - pw|                       of a query tile p and a key tile r
    g              = group[min(dt, K - 1)]
    W_out, h_in, w_in, H_out = windows[head, g]                            in tiles
    kept(p, r)     = (dw <= W_out and dh <= h_in) or (dw <= w_in and dh <= H_out)
    counts[head, p]                    = how many r are kept
    blocks[head, p, :counts[head, p]]  = these r, ascending

Tiles are in raster order (t, h, w), w fastest; one tile is one block. A rectangle with a negative side holds nothing,
and a group whose two rectangles do is dropped. Windows are cut at the border, their centres are not moved.

Shapes: windows ``[H, G, 4]``, group ``[K]``, counts ``[H, Q]``, blocks ``[H, Q, Q]`` with ``Q = Tt * Th * Tw``.
Distances in time of K tiles and more belong to the group of the last entry. What stands in a row of blocks behind its
count is a block, too, and means nothing.
Dtypes: all int32.

The same few operators on every device; beside the results they hold at most ``_ENTRIES`` pairs of tiles at once.

Source: Compact Attention (arXiv:2508.12969): frame groups with two windows each. The outer and inner form
of the two rectangles is the one of its search (``profiles/shrink_windows.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import Argument, Contract, Size, missing_kernel, register
from .tile_mass import offset_bins

CONTRACT = Contract(
    "window_lists",
    {"windows": Argument("H G sides", (torch.int32,)), "group": Argument("K", (torch.int32,))},
    sizes={
        "G": Size(minimum=1),
        "K": Size(minimum=1),
        "sides": Size(one_of=(4,)),
        **dict.fromkeys(("tiles in time", "tiles in a column", "tiles in a row"), Size(minimum=1)),
    },
)


def reference(windows: Tensor, group: Tensor, *, tiles: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The formula for all pairs at once; a stable sort puts what is kept in front."""
    at = torch.stack(torch.unravel_index(torch.arange(math.prod(tiles), device=windows.device), tuple(tiles)))
    dt, dh, dw = (at[:, None] - at[:, :, None]).abs()
    outer_w, inner_h, inner_w, outer_h = windows[:, group.long()[dt.clamp_max(len(group) - 1)]].unbind(-1)
    kept = ((dw <= outer_w) & (dh <= inner_h)) | ((dw <= inner_w) & (dh <= outer_h))
    return kept.sum(-1).int(), (~kept).byte().argsort(dim=-1, stable=True).int()


@torch.library.custom_op(
    "graphwright::window_lists",
    mutates_args=(),
    schema="(Tensor windows, Tensor group, *, SymInt[3] tiles) -> (Tensor, Tensor)",
)
def window_lists(windows: Tensor, group: Tensor, *, tiles: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Blocks that each query tile keeps: counts int32 ``[H, Q]`` and blocks int32 ``[H, Q, Q]``.

    Args:
        windows: int32 ``[H, G, 4]``, (W_out, h_in, w_in, H_out) of each head and group.
        group: int32 ``[K]``, the group of each distance in time; entries below G.
        tiles: How many tiles there are in time, in a column and in a row.

    Raises:
        InvalidArgument: A dtype, shape or size that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for the windows' device.
    """
    raise missing_kernel(CONTRACT.operator, windows.device)


@window_lists.register_fake
def _fake(windows: Tensor, group: Tensor, *, tiles: Sequence[int]) -> tuple[Tensor, Tensor]:
    _require(windows, group, tiles, proved=False)
    count = tiles[0] * tiles[1] * tiles[2]
    return windows.new_empty((windows.shape[0], count)), windows.new_empty((windows.shape[0], count, count))


_ENTRIES = 1 << 20
"""Pairs of tiles that are looked at together; each takes about 40 bytes."""


def _lists(windows: Tensor, group: Tensor, *, tiles: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some rows at a time: look up what is kept by offset, count along the row, and scatter to where the counts say.

    630 tiles (an 80K-token video), 24 heads, one thread of a Zen 4 core: 110 ms; with all rows at once 270 ms.
    """
    _require(windows, group, tiles)
    time, height, width = tiles
    count = math.prod(tiles)
    by_offset = _kept_by_offset(windows, group, time, height, width).flatten(1)
    counts = windows.new_empty((len(windows), count))
    blocks = windows.new_empty((len(windows), count, count))
    every = torch.arange(count, device=windows.device, dtype=torch.int32)
    rows = max(1, _ENTRIES // (count * max(len(windows), 1)))
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        kept = by_offset[:, offset_bins(tiles, every[part].long())]
        before = kept.cumsum(-1, dtype=torch.int32)
        total = before[..., -1:]
        # What is not kept goes behind, in order, so that the places are a permutation of the row.
        place = torch.where(kept, before - 1, total + every - before)
        blocks[:, part].scatter_(-1, place.long(), every.expand_as(place))
        counts[:, part] = total[..., 0]
    return counts, blocks


def _kept_by_offset(windows: Tensor, group: Tensor, time: int, height: int, width: int) -> Tensor:
    """Whether a head keeps the tiles at an offset, bool ``[H, Tt, Th, Tw]``."""
    distance, dh, dw = (torch.arange(size, device=windows.device) for size in (time, height, width))
    of = windows[:, group[distance.clamp_max(len(group) - 1)].long()]
    outer_w, inner_h, inner_w, outer_h = of[..., None, None].unbind(2)
    dh = dh[:, None]
    return ((dw <= outer_w) & (dh <= inner_h)) | ((dw <= inner_w) & (dh <= outer_h))


def _require(windows: Tensor, group: Tensor, tiles: Sequence[int], *, proved: bool = True) -> None:
    if len(tiles) != 3:
        raise InvalidArgument(f"{CONTRACT.operator}: got {len(tiles)} sizes of the grid of tiles, expected 3")
    sizes = dict(zip(("tiles in time", "tiles in a column", "tiles in a row"), tiles, strict=True))
    CONTRACT.require(windows=windows, group=group, proved=proved, **sizes)


torch.library.impl("graphwright::window_lists", "cpu", _lists)
torch.library.impl("graphwright::window_lists", "cuda", _lists)
register(torch.ops.graphwright.window_lists.default, reference, CONTRACT)  # pyright: ignore[reportArgumentType] (two results)
