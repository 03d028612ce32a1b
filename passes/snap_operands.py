"""Queries and keys of an attention that reuse their neighbours: what `reuse_scores` and the sparse rewrites insert.

    q, k      become      graphwright.snap_tokens(q, theta), graphwright.snap_tokens(k, theta)

The threshold is that of the denoising step, read on the device from a table by the timestep that the program is called
with, so one graph serves all steps.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..kernels import snap_tokens as kernel
from ..kernels.contract import Spec
from ..patterns.attention import AttentionSite
from ..patterns.nodes import aten
from ..patterns.video import VideoLayout
from .edit import Edit

if TYPE_CHECKING:
    from .sparsify_attention import GridSizes


@dataclass(frozen=True)
class Snap:
    """How tokens are snapped; see `kernels/snap_tokens.py`.

    Attributes:
        thetas: The threshold of each denoising step, or one for all.
        edges: The timesteps between steps, falling, one fewer than thresholds.
        timestep: Name of the input that carries the timestep; not needed for one threshold.
        groups: Channels of each group of a head.
        factors: What thresholds are multiplied with, for each group.
        axes: Along which axes tokens may be reused, 0 to 2 for t, h, w.
        window: Tokens of a window.
        granularity: "element", "group" or "token".
    """

    thetas: Sequence[float] = ()
    edges: Sequence[float] = ()
    timestep: str = ""
    groups: Sequence[int] = ()
    factors: Sequence[float] = ()
    axes: Sequence[int] = (0, 1, 2)
    window: int = 2
    granularity: str = "element"

    def refuse(self, site: AttentionSite, layout: VideoLayout, edit: Edit) -> str | None:
        """Why the options do not fit a site, None where they do."""
        if not self.thetas or len(self.edges) != len(self.thetas) - 1:
            return f"got {len(self.thetas)} thresholds and {len(self.edges)} edges, expected one edge between each two"
        if list(self.edges) != sorted(self.edges, reverse=True):
            return "the edges between steps must fall, as timesteps do"
        if self.edges and _timestep(self.timestep, edit) is None:
            return f"the program has no input {self.timestep!r} that would tell the step"
        grid = (layout.frames, layout.height, layout.width)
        for operand in (site.query, site.key):
            value = operand.meta["val"]
            reason = kernel.CONTRACT.check(x=value, theta=Spec((1,), torch.float32), window=self.window)
            reason = reason or kernel.misfit(
                value.shape, self.groups, self.factors, grid, layout.first, self.axes, self.granularity
            )
            if reason is not None:
                return reason
        return None

    def operands(self, site: AttentionSite, sizes: GridSizes, edit: Edit) -> tuple[Node, Node]:
        """Snapped queries and keys."""
        theta = self._theta(site, edit)
        found = []
        for x in (site.query, site.key):
            made = edit.call(
                torch.ops.graphwright.snap_tokens.default,
                x, theta, list(self.groups), list(self.factors), **self._where(sizes), granularity=self.granularity,
                like=site.node,
            )  # fmt: skip
            found.append(edit.call(operator.getitem, made, 0, like=site.node))
        return found[0], found[1]

    def roots(self, site: AttentionSite, sizes: GridSizes, edit: Edit) -> tuple[Node, Node]:
        """The tokens that stand for queries and keys, at granularity "token"."""
        theta = self._theta(site, edit)
        target = torch.ops.graphwright.token_roots.default
        query, key = (edit.call(target, x, theta, **self._where(sizes), like=site.node) for x in (site.query, site.key))
        return query, key

    def _where(self, sizes: GridSizes) -> dict[str, Any]:
        return {
            "frames": sizes.frames,
            "height": sizes.height,
            "width": sizes.width,
            "first": sizes.first,
            "axes": list(self.axes),
            "window": self.window,
        }

    def _theta(self, site: AttentionSite, edit: Edit) -> Node:
        """The threshold of the step, float32 [1]."""
        like, device = site.node, site.query.meta["val"].device

        def stored(values: Sequence[float]) -> Node:
            digest = hashlib.sha256(repr(list(values)).encode()).hexdigest()[:12]
            return edit.buffer(f"thresholds.{digest}", lambda: torch.tensor(values, dtype=torch.float32, device=device))

        if len(self.thetas) == 1:
            return stored(self.thetas)
        timestep = _timestep(self.timestep, edit)
        assert timestep is not None
        first = edit.call(aten.reshape.default, timestep, [-1], like=like)
        first = edit.call(aten.slice.Tensor, first, 0, 0, 1, like=like)
        first = edit.call(aten._to_copy.default, first, dtype=torch.float32, like=like)
        behind = edit.call(aten.lt.Tensor, first, stored(self.edges), like=like)
        step = edit.call(aten.sum.dim_IntList, behind, [0], True, like=like)
        return edit.call(aten.index_select.default, stored(self.thetas), 0, step, like=like)


def _timestep(name: str, edit: Edit) -> Node | None:
    """The argument of a name: a denoiser's arguments are those of one dictionary, called `inputs`."""
    names = {name, f"inputs_{name}"}
    found = (n for n in edit.graph.find_nodes(op="placeholder") if n.name in names and edit.view.is_user_input(n))
    return next(found, None)
