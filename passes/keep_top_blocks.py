"""RainFusion 2.0: keep for each query block the key blocks whose mean keys score highest, chosen in each call.

    q, k, v ── attention ── y

becomes

    q, k ── window order ── means of blocks ── softmax(q k^T) ── topk ── blocks [B * H, Q, K]
    q, k, v, blocks ── graphwright.block_sparse_attention ── y

Tokens stand in 8x8 windows of a frame, so that a block of 128 is two neighbouring windows. The first frame and text
are protected: they stand last and are dense as rows and columns.

Source: RainFusion 2.0, arXiv 2512.24086, and its public code. There the share of blocks is taken of all blocks, and
ties keep more than that; here it is taken of the blocks that are not protected, and ties go to one of the equals.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..patterns.attention import AttentionSite
from ..patterns.nodes import aten
from ..patterns.video import VideoLayout
from .edit import Edit
from .sparsify_attention import BlockLists, SparsifyAttention, grid_sizes, order_node


@dataclass(frozen=True)
class KeepTopBlocks(SparsifyAttention):
    """Keep the best key blocks of each query block.

    Attributes:
        sparsity: Share of the blocks that is left out.
        window: Rows and columns of a window.
    """

    name: ClassVar[str] = "keep_top_blocks"

    sparsity: float = 0.8
    window: Sequence[int] = (8, 8)

    def refuse(self, site: AttentionSite, layout: VideoLayout) -> str | None:
        """A static grid of at least two frames, since the number of kept blocks is a static size."""
        if not (isinstance(layout.frames, int) and isinstance(layout.text, int)):
            return "the number of blocks is not static"
        if layout.frames < 2:
            return "there is one frame only, and the first is protected"
        if site.heads != site.kv_heads:
            return f"{site.heads} heads share {site.kv_heads} key heads"
        if self._blocks(layout) < 1:
            return f"no block of {self.block_size} after the first frame"
        return None

    def lists(self, site: AttentionSite, layout: VideoLayout, edit: Edit) -> BlockLists:
        """Scores of block means, and the best of each row in ascending order."""
        sizes = grid_sizes(site, layout, edit)
        order = order_node("window", sizes, site, edit, protect_frame=True, shape=tuple(self.window))
        size = self._blocks(layout)
        kept = math.ceil(size * (1 - self.sparsity))

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.call(target, *args, like=site.node, **kwargs)

        index = call(aten.slice.Tensor, call(aten.select.int, order, 0, 0), 0, 0, size * self.block_size)
        means = []
        for source in (site.query, site.key):
            ordered = call(aten.index_select.default, source, 2, index)
            shape = [-1, site.heads, size, self.block_size, site.head_dim]
            means.append(call(aten.mean.dim, call(aten.view.default, ordered, shape), [3]))
        scores = call(aten.matmul.default, means[0], call(aten.transpose.int, means[1], 2, 3))
        # A row's softmax does not change the order of its scores, so it is left out.
        best = call(operator.getitem, call(aten.topk.default, scores, kept), 1)
        ascending = call(operator.getitem, call(aten.sort.default, best), 0)
        blocks = call(aten._to_copy.default, call(aten.flatten.using_ints, ascending, 0, 1), dtype=torch.int32)
        counts = call(aten.full_like.default, call(aten.select.int, blocks, 2, 0), kept)
        return BlockLists(counts, blocks, None, order, size)

    def _blocks(self, layout: VideoLayout) -> int:
        """Whole blocks in the frames after the first."""
        return (layout.frames - 1) * layout.height * layout.width // self.block_size
