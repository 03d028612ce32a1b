"""Specialise attention to a cache that holds nothing yet: attend to the new tokens only.

    cache' = index_copy(cache, 2, position, k)                     cache' = index_copy(cache, 2, position, k)
    sdpa(q, cache', ..., mask[j <= position + i])      becomes     sdpa(q, k, ..., is_causal=True)

Where positions start at zero, key j of the cache is new token j for j < S and masked for all others, so both sides are
equal; the left one computes attention over the whole length of the cache. Of a mask that
says more than causality (a window, padding, ALiBi's slopes) the part over the new tokens stays. Exact under the phase's
condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ..patterns.attention_forms import SDPA
from ..patterns.cache import CacheSite, find_caches
from ..patterns.graph import Refusal
from ..patterns.masks import MaskFact, analyse_mask
from ..patterns.nodes import arguments, aten, shape_of
from .base import Pass, PassResult
from .edit import Edit


@dataclass(frozen=True)
class AssumeEmptyCache(Pass):
    """Read keys and values from where they are computed, not from the cache.

    Attributes:
        start_input: The position input that is known to begin at zero.
    """

    name: ClassVar[str] = "assume_empty_cache"
    requires: ClassVar[str] = "canonical"

    start_input: str = "cache_position"

    def run(self, edit: Edit) -> PassResult:
        """Rewrite every cached attention whose mask lets a query see new tokens only when positions start at zero."""
        changed, refusals = 0, []
        for site in find_caches(edit.view).sites:
            outcome = self._rewrite(edit, site)
            if isinstance(outcome, Refusal):
                refusals.append(outcome)
            else:
                changed += 1
        return PassResult(changed, tuple(refusals))

    def _rewrite(self, edit: Edit, site: CacheSite) -> Refusal | None:
        node = site.attention
        args = arguments(node)
        queries, keys = shape_of(args["query"])[-2], shape_of(args["key"])[-2]
        fact = analyse_mask(edit.view, args["attn_mask"], queries, keys)
        if fact.kind not in ("cache_causal", "cache_alibi") or not self._starts_at_zero(edit, fact):
            return edit.view.refuse(node, "the mask is not causal in the cache's positions", depth=2, mask=fact.kind)
        mask = None
        if fact.window is not None or fact.padding is not None or fact.slopes:
            tokens = edit.call(aten.sym_size.int, args["query"], 2, like=node)
            mask = edit.call(aten.slice.Tensor, args["attn_mask"], -1, 0, tokens, like=node)
        attention = edit.call(
            SDPA,
            args["query"],
            site.new_key,
            site.new_value,
            mask,
            0.0,
            mask is None,
            scale=args["scale"],
            enable_gqa=args["enable_gqa"],
            like=node,
        )
        edit.replace(node, attention)
        return None

    def _starts_at_zero(self, edit: Edit, fact: MaskFact) -> bool:
        position = fact.positions
        return isinstance(position, Node) and edit.view.is_user_input(position) and position.name == self.start_input
