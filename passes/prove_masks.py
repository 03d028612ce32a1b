"""Replace masks by what they were proved to be.

    sdpa(q, k, v, mask)        becomes        sdpa(q, k, v)                      where the mask keeps everything
                               becomes        sdpa(q, k, v, is_causal=True)      where it keeps key j for query i >= j

The proof is in `patterns/masks.py`. A kernel that is told "causal" skips half of the work; one that is given the same
mask as a tensor does all of it, and more. Exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..patterns.attention_forms import SDPA
from ..patterns.masks import analyse_mask
from ..patterns.nodes import arguments, is_call, shape_of
from .base import Pass, PassResult
from .edit import Edit


@dataclass(frozen=True)
class ProveMasks(Pass):
    """Drop masks that keep everything; turn causal ones into SDPA's own flag."""

    name: ClassVar[str] = "prove_masks"
    after: ClassVar[tuple[str, ...]] = ("raise_attention",)
    requires: ClassVar[str] = "exported"
    ensures: ClassVar[str] = "exported"

    def run(self, edit: Edit) -> PassResult:
        """Analyse each SDPA's mask; one that many layers share is analysed once."""
        changed = 0
        for node in list(edit.graph.nodes):
            if not is_call(node, SDPA):
                continue
            args = arguments(node)
            if args["attn_mask"] is None:
                continue
            queries, keys = shape_of(args["query"])[-2], shape_of(args["key"])[-2]
            fact = analyse_mask(edit.view, args["attn_mask"], queries, keys)
            causal = fact.kind in ("causal", "causal_top_left")
            if not (causal or fact.kind == "always") or fact.window is not None or fact.padding is not None:
                continue
            attention = edit.call(
                SDPA,
                args["query"],
                args["key"],
                args["value"],
                None,
                0.0,
                causal,
                scale=args["scale"],
                enable_gqa=args["enable_gqa"],
                like=node,
            )
            edit.replace(node, attention)
            changed += 1
        return PassResult(changed)
