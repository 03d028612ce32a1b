"""What rewrites of video attention to block lists have in common: the layout, the guard, and the call.

    scaled_dot_product_attention(q, k, v, key mask) ── y

becomes, with lists, patterns and a token order that the subclass makes,

    graphwright.block_sparse_attention(q, k, v, counts, blocks, pattern, order, key bias) ── y

A subclass is a site pass of its own: `route_heads.py`, `keep_windows.py`, `keep_top_blocks.py`.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..kernels import block_sparse_attention as sparse
from ..kernels.contract import Spec
from ..kernels.token_order import token_order
from ..patterns.attention import AttentionSite
from ..patterns.graph import Refusal
from ..patterns.nodes import aten, dtype_of
from ..patterns.video import VideoLayout, video_layout
from .base import SitePass
from .edit import Edit
from .snap_operands import Snap


@dataclass(frozen=True)
class BlockLists:
    """What the operator is to attend to: nodes, and the number of key blocks that the lists govern.

    `pattern` and `order` may be None; see `kernels/block_sparse_attention.py`.
    """

    counts: Node
    blocks: Node
    pattern: Node | None
    order: Node | None
    key_blocks: Any


@dataclass(frozen=True)
class SparsifyAttention(SitePass[AttentionSite]):
    """Rewrite self or joint attention over a latent grid to block lists.

    Attributes:
        grid: Frames, height and width in tokens; None for a dynamic number of frames.
        block_size: Tokens of a block, 64 or 128.
        snap: Options of `Snap` where queries and keys are to be snapped first (TimeRipple); empty for none.
    """

    absorbs: ClassVar[Mapping[str, str]] = {"reuse_scores": "snap"}

    grid: Sequence[int | None] = ()
    block_size: int = 64
    snap: Mapping[str, Any] = field(default_factory=dict)

    def guard(self, site: AttentionSite, edit: Edit) -> str | None:
        """The layout must be proved again, the operator must take the site, and the subclass its options."""
        layout = layout_on(self.grid, site, edit)
        if isinstance(layout, str):
            return layout
        reason = self.refuse(site, layout)
        if reason is None and self.snap:
            reason = Snap(**self.snap).refuse(site, layout, edit)
        if reason is not None:
            return reason
        return sparse.CONTRACT.check(
            query=site.query.meta["val"],
            key=site.key.meta["val"],
            value=site.value.meta["val"],
            counts=Spec((1, 1), torch.int32),
            blocks=Spec((1, 1, 1), torch.int32),
            block_size=self.block_size,
        )

    def rewrite(self, site: AttentionSite, edit: Edit) -> None:
        """Make the lists and call the operator."""
        layout = layout_on(self.grid, site, edit)
        assert not isinstance(layout, str)
        if self.snap:
            query, key = Snap(**self.snap).operands(site, grid_sizes(site, layout, edit), edit)
            site = replace(site, query=query, key=key)
        lists = self.lists(site, layout, edit)
        output = edit.call(
            torch.ops.graphwright.block_sparse_attention.default,
            site.query,
            site.key,
            site.value,
            lists.counts,
            lists.blocks,
            lists.pattern,
            lists.order,
            None if layout.key_mask is None else key_bias(layout.key_mask, site.node, edit),
            key_blocks=lists.key_blocks,
            block_size=self.block_size,
            scale=site.scale,
            like=site.node,
        )
        edit.replace(site.node, output)

    @abstractmethod
    def refuse(self, site: AttentionSite, layout: VideoLayout) -> str | None:
        """Why the options do not fit the site, None where they do."""

    @abstractmethod
    def lists(self, site: AttentionSite, layout: VideoLayout, edit: Edit) -> BlockLists:
        """Make the block lists of a site."""

    def row_names(self) -> tuple[str, ...]:
        """What the rows of the lists are, where heads choose among them; empty where each head has its own."""
        return ()


@dataclass(frozen=True)
class GridSizes:
    """A layout's sizes as operator arguments: plain numbers, or nodes where they are dynamic."""

    frames: Any
    height: int
    width: int
    first: Any
    text: Any

    @property
    def static(self) -> bool:
        """Whether all sizes are numbers."""
        return all(isinstance(size, int) for size in (self.frames, self.height, self.width, self.first, self.text))


def layout_on(grid: Sequence[int | None], site: AttentionSite, edit: Edit) -> VideoLayout | str:
    """How a site's tokens lie on a grid, proved on the graph as it is now; or why they do not."""
    if len(grid) != 3:
        return f"the grid must be (frames, height, width), got {list(grid)}"
    layout = video_layout(edit.view, site, tuple(grid))
    return str(layout) if isinstance(layout, Refusal) else layout


def grid_sizes(site: AttentionSite, layout: VideoLayout, edit: Edit) -> GridSizes:
    """The sizes of a layout; what is dynamic is computed in the graph."""
    height, width = layout.height, layout.width
    first, text = (edit.size_of(size, site.node) for size in (layout.first, layout.text))
    if isinstance(layout.frames, int):
        return GridSizes(layout.frames, height, width, first, text)
    length = edit.call(aten.sym_size.int, site.query, 2, like=site.node)
    video = edit.size(operator.sub, length, text, like=site.node)
    return GridSizes(edit.size(operator.floordiv, video, height * width, like=site.node), height, width, first, text)


def order_node(
    kind: Any, sizes: GridSizes, site: AttentionSite, edit: Edit, *, protect_frame: bool, shape: tuple[int, ...]
) -> Node:
    """A token order int32 [1, P]: a stored index that all sites share, or one computed from dynamic sizes."""
    if not sizes.static:
        return edit.call(
            torch.ops.graphwright.token_order.default,
            site.query,
            kind,
            sizes.frames,
            sizes.height,
            sizes.width,
            sizes.first,
            sizes.text,
            protect_frame,
            list(shape),
            like=site.node,
        )
    device = site.query.meta["val"].device
    place = (sizes.frames, sizes.height, sizes.width)
    name = "_".join(map(str, (kind, *place, sizes.first, sizes.text, int(protect_frame), *shape)))

    def make() -> torch.Tensor:
        return token_order(
            kind,
            *place,
            first=sizes.first,
            text=sizes.text,
            protect_frame=protect_frame,
            shape=shape,
            device=device,
        )[None].clone()

    return edit.buffer(f"token_order.{name}", make)


def key_bias(mask: Node, like: Node, edit: Edit) -> Node:
    """For operators: a key mask [B, 1, 1, M], bool or added to the scores, as a float32 bias [B, 1, M]."""
    if dtype_of(mask) is torch.bool:
        dropped = edit.call(aten.logical_not.default, mask, like=like)
        zeros = edit.call(aten.zeros_like.default, mask, dtype=torch.float32, like=like)
        mask = edit.call(aten.masked_fill.Scalar, zeros, dropped, float("-inf"), like=like)
    elif dtype_of(mask) is not torch.float32:
        mask = edit.call(aten._to_copy.default, mask, dtype=torch.float32, like=like)
    return edit.call(aten.squeeze.dim, mask, 2, like=like)
