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
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..kernels import collapsed_attention as collapsed
from ..kernels.contract import Spec
from ..patterns.attention import AttentionSite
from ..patterns.nodes import shape_of
from .base import SitePass
from .edit import Edit
from .snap_operands import Snap
from .sparsify_attention import grid_sizes, key_bias, layout_on


@dataclass(frozen=True)
class ReuseScores(SitePass[AttentionSite], Snap):
    """Snap queries and keys of self or joint attention over a latent grid, with the options of `Snap`.

    Attributes:
        grid: Frames, height and width in tokens; None for a dynamic number of frames.
        collapse: Leave rows and keys out that others stand for; needs granularity "token".
    """

    name: ClassVar[str] = "reuse_scores"

    grid: Sequence[int | None] = ()
    collapse: bool = False

    def guard(self, site: AttentionSite, edit: Edit) -> str | None:
        """The layout must be proved again, and the operators must take the site."""
        layout = layout_on(self.grid, site, edit)
        if isinstance(layout, str):
            return layout
        reason = self.refuse(site, layout, edit)
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
        layout = layout_on(self.grid, site, edit)
        assert not isinstance(layout, str)
        sizes = grid_sizes(site, layout, edit)
        if self.collapse:
            roots = self.roots(site, sizes, edit)
            bias = None if layout.key_mask is None else key_bias(layout.key_mask, site.node, edit)
            output = edit.call(
                torch.ops.graphwright.collapsed_attention.default,
                site.query, site.key, site.value, *roots, bias, scale=site.scale, like=site.node,
            )  # fmt: skip
        else:
            query, key = self.operands(site, sizes, edit)
            rest: Any = site.node.args[2:]
            named: dict[str, Any] = dict(site.node.kwargs)
            for name in ("query", "key"):
                named.pop(name, None)
            assert callable(site.node.target)
            output = edit.call(site.node.target, query, key, *rest, **named, like=site.node)
        edit.replace(site.node, output)
