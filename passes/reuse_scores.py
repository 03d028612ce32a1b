"""TimeRipple: partial scores of neighbouring tokens that nearly agree are computed once.

    scaled_dot_product_attention(q, k, v, mask) ── y

becomes, with the threshold of the step, `theta`,

    q, k ── graphwright.snap_tokens(theta) ── scaled_dot_product_attention(q~, k~, v, mask) ── y

or, where whole tokens are snapped and so equal rows and columns of the score map can be left out,

    q, k ── graphwright.token_roots(theta) ── graphwright.collapsed_attention(q, k, v, roots) ── y

The first form computes what reuse of partial scores would give, and saves no time: a matrix product has no use for
factors that are equal here and there. The second one gives the same as the first and takes time for what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from ..kernels import collapsed_attention as collapsed
from ..kernels.contract import Spec
from ..patterns.attention import AttentionSite
from ..patterns.graph import Refusal, shape_of
from ..patterns.video import video_layout
from .base import SitePass
from .edit import Edit
from .snap_operands import Snap
from .sparsify_attention import grid_sizes, key_bias


@dataclass(frozen=True)
class ReuseScores(SitePass[AttentionSite]):
    """Snap queries and keys of self or joint attention over a latent grid.

    Attributes:
        grid: Frames, height and width in tokens; None for a dynamic number of frames.
        thetas, edges, timestep, groups, factors, axes, window, granularity: As in `Snap`.
        collapse: Leave rows and keys out that others stand for; needs granularity "token".
    """

    name: ClassVar[str] = "reuse_scores"

    grid: Sequence[int | None] = ()
    thetas: Sequence[float] = ()
    edges: Sequence[float] = ()
    timestep: str = ""
    groups: Sequence[int] = ()
    factors: Sequence[float] = ()
    axes: Sequence[int] = (0, 1, 2)
    window: int = 2
    granularity: str = "element"
    collapse: bool = False

    @property
    def snap(self) -> Snap:
        """The options of the snapping alone."""
        return Snap(**{item.name: getattr(self, item.name) for item in fields(Snap)})

    def guard(self, site: AttentionSite, edit: Edit) -> str | None:
        """The layout must be proved again, and the operators must take the site."""
        if len(self.grid) != 3:
            return f"the grid must be (frames, height, width), got {list(self.grid)}"
        layout = video_layout(edit.view, site, tuple(self.grid))
        if isinstance(layout, Refusal):
            return str(layout)
        reason = self.snap.refuse(site, layout, edit)
        if reason is not None or not self.collapse:
            return reason
        if self.granularity != "token":
            return f"only whole tokens can be left out, the granularity is {self.granularity!r}"
        query, key, value = (operand.meta["val"] for operand in (site.query, site.key, site.value))
        roots: dict[str, Any] = {
            f"{name}_root": Spec(shape_of(operand)[:3], torch.int32)
            for name, operand in (("query", site.query), ("key", site.key))
        }
        return collapsed.CONTRACT.check(query=query, key=key, value=value, **roots)

    def rewrite(self, site: AttentionSite, edit: Edit) -> None:
        """Snap, and attend to what is snapped."""
        layout = video_layout(edit.view, site, tuple(self.grid))
        assert not isinstance(layout, Refusal)
        sizes = grid_sizes(site, layout, edit)
        if self.collapse:
            roots = self.snap.roots(site, sizes, edit)
            bias = None if layout.key_mask is None else key_bias(layout.key_mask, site.node, edit)
            output = edit.call(
                torch.ops.graphwright.collapsed_attention.default,
                site.query, site.key, site.value, *roots, bias, scale=site.scale, like=site.node,
            )  # fmt: skip
        else:
            query, key = self.snap.operands(site, sizes, edit)
            rest: Any = site.node.args[2:]
            named: dict[str, Any] = dict(site.node.kwargs)
            for name in ("query", "key"):
                named.pop(name, None)
            assert callable(site.node.target)
            output = edit.call(site.node.target, query, key, *rest, **named, like=site.node)
        edit.replace(site.node, output)
