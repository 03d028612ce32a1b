"""RainFusion: type each head when the program runs, and give it the block lists of its type.

    q, k, v ── attention ── y

becomes

    q, k ── one frame's tokens ───────── graphwright.band_recall ── temporal?  ┐
    q, k ── every (T-1)-th token ─────── graphwright.band_recall ── spatial?   ├ pattern [B, H]
                                                          neither: textural    ┘
    q, k, v, lists of all types, pattern ── graphwright.block_sparse_attention ── y

The types are decided on the device, anew in each call, at two small attention maps a head; nothing waits for the host
and all shapes are static. Kinds, bands and lists: `kernels/head_patterns.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import band_recall as _band_recall  # noqa: F401 (registers the operator)
from ..kernels.head_patterns import head_patterns, row_names
from ..patterns.attention import AttentionSite
from ..patterns.nodes import aten
from ..patterns.video import VideoLayout
from .edit import Edit
from .sparsify_attention import BlockLists, GridSizes, SparsifyAttention, grid_sizes


@dataclass(frozen=True)
class RouteHeads(SparsifyAttention):
    """Choose temporal, spatial or textural lists for each head online.

    Attributes:
        bandwidths: Half-widths of bands as shares of the tokens, narrow to wide; a head gets the narrowest that holds.
        tau: Textural heads keep one key in tau.
        alpha: A band holds when it keeps at least this much of the sampled attention mass.
        textural: Whether there is a third type; without it a head that no band holds takes the better of two.
    """

    name: ClassVar[str] = "route_heads"

    bandwidths: Sequence[float] = (0.29,)
    tau: int = 2
    alpha: float = 0.9
    textural: bool = True

    def refuse(self, site: AttentionSite, layout: VideoLayout) -> str | None:
        """At least two frames, of which one is protected, and one block after it."""
        if list(self.bandwidths) != sorted(self.bandwidths) or not self.bandwidths:
            return f"bandwidths must go from narrow to wide, got {list(self.bandwidths)}"
        if isinstance(layout.frames, int):
            if layout.frames < 2:
                return "there is one frame only, and the first is protected"
            rest = (layout.frames - 1) * layout.height * layout.width
            if rest < self.block_size:
                return f"{rest} tokens after the first frame are less than a block of {self.block_size}"
        return None

    def row_names(self) -> tuple[str, ...]:
        """The type of each row."""
        return row_names(len(self.bandwidths))

    def lists(self, site: AttentionSite, layout: VideoLayout, edit: Edit) -> BlockLists:
        """Lists of all types, and the choice among them."""
        sizes = grid_sizes(site, layout, edit)
        orders, counts, blocks = self._tables(sizes, site, edit)
        others = edit.size(operator.sub, sizes.frames, 1, like=site.node)
        rest = edit.size(operator.mul, others, sizes.height * sizes.width, like=site.node)
        key_blocks = edit.size(operator.floordiv, rest, self.block_size, like=site.node)
        return BlockLists(counts, blocks, self._pattern(sizes, site, edit), orders, key_blocks)

    def _tables(self, sizes: GridSizes, site: AttentionSite, edit: Edit) -> tuple[Node, Node, Node]:
        if not sizes.static:
            made = edit.call(
                torch.ops.graphwright.head_patterns.default,
                site.query,
                sizes.frames,
                sizes.height,
                sizes.width,
                sizes.first,
                sizes.text,
                self.block_size,
                list(self.bandwidths),
                self.tau,
                like=site.node,
            )
            orders, counts, blocks = (edit.call(operator.getitem, made, part, like=site.node) for part in range(3))
            return orders, counts, blocks
        tables: list[Tensor] = []

        def make(part: int) -> Tensor:
            if not tables:
                tables.extend(
                    head_patterns(
                        sizes.frames,
                        sizes.height,
                        sizes.width,
                        first=sizes.first,
                        text=sizes.text,
                        block_size=self.block_size,
                        bandwidths=tuple(self.bandwidths),
                        tau=self.tau,
                        device=site.query.meta["val"].device,
                    )
                )
            return tables[part].clone()

        place = (sizes.frames, sizes.height, sizes.width, sizes.first, sizes.text, self.block_size, self.tau)
        name = "_".join(map(str, (*place, *(round(1000 * b) for b in self.bandwidths))))
        orders, counts, blocks = (
            edit.buffer(f"head_patterns.{part}.{name}", lambda number=number: make(number))
            for number, part in enumerate(("order", "counts", "blocks"))
        )
        return orders, counts, blocks

    def _pattern(self, sizes: GridSizes, site: AttentionSite, edit: Edit) -> Node:
        """The row of each head, int64 [B, H]."""

        def call(target: Any, *args: Any, **kwargs: Any) -> Node:
            return edit.call(target, *args, like=site.node, **kwargs)

        frame, count = sizes.height * sizes.width, len(self.bandwidths)
        device = site.query.meta["val"].device
        widths = edit.buffer(
            "band_widths." + "_".join(str(int(b * frame)) for b in self.bandwidths),
            lambda: torch.tensor([int(b * frame) for b in self.bandwidths], dtype=torch.int32, device=device),
        )

        def size(target: Any, *values: Any) -> Any:
            return edit.size(target, *values, like=site.node)

        start = size(operator.add, sizes.first, frame)
        last = size(operator.add, sizes.first, size(operator.mul, sizes.frames, frame))
        others = size(operator.sub, sizes.frames, 1)
        recalls = []
        for stop, stride in ((size(operator.add, start, frame), 1), (last, others)):
            query, key = (call(aten.slice.Tensor, source, 2, start, stop, stride) for source in (site.query, site.key))
            recalls.append(call(torch.ops.graphwright.band_recall.default, query, key, widths, scale=site.scale))
        # Recall grows with the width, so the number of bands that do not hold is the index of the narrowest that does.
        failing = [call(aten.sum.dim_IntList, call(aten.lt.Scalar, recall, self.alpha), [-1]) for recall in recalls]
        holds = call(aten.lt.Scalar, failing[0], count)
        if not self.textural:
            failing = [call(aten.clamp_max.default, number, count - 1) for number in failing]
            widest = [call(aten.select.int, recall, -1, count - 1) for recall in recalls]
            holds = call(aten.logical_or.default, holds, call(aten.ge.Tensor, *widest))
        return call(aten.where.self, holds, failing[0], call(aten.add.Tensor, failing[1], count))
