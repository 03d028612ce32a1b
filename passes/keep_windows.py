"""Compact Attention: static windows for each head, over 3D tiles of tokens.

    q, k, v ── attention ── y

becomes

    windows [H, G, 4] ── graphwright.window_lists ── counts, blocks
    q, k, v, counts, blocks, tile order ── graphwright.block_sparse_attention ── y

A query tile keeps a key tile where, in the group of their distance in time, one of two rectangles around it holds the
other. Text is dense. The lists are made on the device from four numbers a head and group: stored, they would be as
large as a mask of all tile pairs for each layer and range of steps.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import window_lists as _window_lists  # noqa: F401 (registers the operator)
from ..patterns.attention import AttentionSite
from ..patterns.video import VideoLayout
from .edit import Edit
from .sparsify_attention import BlockLists, SparsifyAttention, grid_sizes, order_node


@dataclass(frozen=True)
class KeepWindows(SparsifyAttention):
    """Keep the key tiles inside a head's windows.

    Attributes:
        tile: Tokens of a tile along (t, h, w); their product is the block size.
        groups: For each distance in time, in tiles, the index of its group; longer distances belong to the last.
        windows: For each head and group (W_out, h_in, w_in, H_out) in tiles: a key tile is kept where |dw| <= W_out and
            |dh| <= h_in, or |dw| <= w_in and |dh| <= H_out. Negative: none.
    """

    name: ClassVar[str] = "keep_windows"

    tile: Sequence[int] = ()
    groups: Sequence[int] = ()
    windows: Sequence[Sequence[Sequence[int]]] = ()

    def refuse(self, site: AttentionSite, layout: VideoLayout) -> str | None:
        """One set of windows a head, four numbers a group, and tiles of one block."""
        if len(self.tile) != 3 or prod(self.tile) != self.block_size:
            return f"a tile of {list(self.tile)} tokens is no block of {self.block_size}"
        if len(self.windows) != site.heads:
            return f"windows of {len(self.windows)} heads for an attention of {site.heads}"
        groups = max(self.groups, default=-1) + 1
        if not groups or any(len(head) != groups or any(len(group) != 4 for group in head) for head in self.windows):
            return f"expected {groups} groups of four numbers for each head"
        return None

    def lists(self, site: AttentionSite, layout: VideoLayout, edit: Edit) -> BlockLists:
        """Windows and groups as stored tensors, expanded on the device."""
        sizes = grid_sizes(site, layout, edit)
        device = site.query.meta["val"].device

        def stored(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        digest = hashlib.sha256(repr(self.windows).encode()).hexdigest()[:12]
        windows = edit.buffer(f"windows.{digest}", lambda: stored(self.windows))
        groups = edit.buffer("time_groups." + "_".join(map(str, self.groups)), lambda: stored(self.groups))
        tiles = [
            edit.size(operator.floordiv, edit.size(operator.add, size, part - 1, like=site.node), part, like=site.node)
            for size, part in zip((sizes.frames, sizes.height, sizes.width), self.tile, strict=True)
        ]
        made = edit.call(torch.ops.graphwright.window_lists.default, windows, groups, tiles=tiles, like=site.node)
        counts, blocks = (edit.call(operator.getitem, made, part, like=site.node) for part in range(2))
        order = order_node("tile", sizes, site, edit, protect_frame=False, shape=tuple(self.tile))
        spatial = edit.size(operator.mul, tiles[1], tiles[2], like=site.node)
        return BlockLists(counts, blocks, None, order, edit.size(operator.mul, tiles[0], spatial, like=site.node))
