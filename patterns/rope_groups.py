"""Which channels of a head turn with which axis of the grid, proved from the rotary tables that the graph holds.

    q ── x cos[n, c] ± rotated q ── x sin[n, c] ── attention      cos[(t, h, w), c] changes along t alone: c is in "t"

A table is a tensor that depends on weights only, with one row a video token and one column a channel of a head.
Channels that change along no axis or along several are in "other".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.fx import Node

from .attention import AttentionSite
from .graph import GraphView, Refusal
from .nodes import NotEvaluable, aten, is_call, is_size, same_size, shape_of
from .video import VideoLayout

AXES = "thw"


@dataclass(frozen=True)
class RopeGroup:
    """Neighbouring channels of a head that turn with one axis: "t", "h", "w" or "other"."""

    axis: str
    channels: int


def rope_groups(view: GraphView, site: AttentionSite, layout: VideoLayout) -> tuple[RopeGroup, ...] | Refusal:
    """Prove the groups of an attention's queries.

    Args:
        view: The graph.
        site: An attention over a latent grid.
        layout: Where its video is.

    Returns:
        The groups, in order of the channels; or why they are not known.
    """
    frames, height, width = layout.frames, layout.height, layout.width
    if not isinstance(frames, int):
        return view.refuse(site.node, "the number of frames is dynamic, so rotary tables have no fixed rows")
    varies = torch.zeros(3, site.head_dim, dtype=torch.bool)
    found = 0
    for node in _before_projection(site.query):
        table = _table(view, node, frames * height * width, site.head_dim)
        if table is None:
            continue
        found += 1
        grid = table.view(frames, height, width, -1)
        for axis in range(3):
            varies[axis] |= (grid != grid.narrow(axis, 0, 1)).flatten(0, 2).any(0)
    if not found:
        return view.refuse(site.node, "no rotary table that the graph holds has a row a token and a column a channel")
    if not varies.any():
        return view.refuse(site.node, "the rotary tables are the same for all tokens", depth=1)
    names = [AXES[int(column.int().argmax())] if column.sum() == 1 else "other" for column in varies.T]
    return tuple(RopeGroup(axis, len(list(run))) for axis, run in groupby(names))


def _before_projection(query: Node) -> list[Node]:
    """The nodes between a query and what is projected to it."""
    seen: dict[Node, None] = {}
    stack = [query]
    while stack:
        node = stack.pop()
        if node in seen or is_size(node) or is_call(node, aten.linear.default, aten.addmm.default):
            continue
        seen[node] = None
        stack.extend(node.all_input_nodes)
    return list(seen)


def _table(view: GraphView, node: Node, tokens: int, channels: int) -> Tensor | None:
    """A node's value as [tokens, channels], where it is such a table."""
    sizes = [size for size in shape_of(node) if not same_size(size, 1)]
    if len(sizes) != 2 or not (same_size(sizes[0], tokens) and same_size(sizes[1], channels)):
        return None
    try:
        value = view.evaluate(node, {}, {})
    except (NotEvaluable, RuntimeError, KeyError):
        return None
    return value.reshape(tokens, channels) if value.is_floating_point() else None
