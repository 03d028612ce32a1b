"""What the mask of a cached attention hides, and whether a cache that is kept in another form can do without it."""

from __future__ import annotations

from ..patterns.cache import CacheSite
from ..patterns.masks import MaskFact, analyse_mask
from ..patterns.nodes import arguments, shape_of
from .edit import Edit


def cache_mask(site: CacheSite, edit: Edit) -> MaskFact:
    """What was proved of the mask of a site's attention."""
    args = arguments(site.attention)
    queries, keys = shape_of(args["query"])[-2], shape_of(args["key"])[-2]
    return analyse_mask(edit.view, args["attn_mask"], queries, keys, is_causal=args["is_causal"])


def refuse_cache_mask(site: CacheSite, edit: Edit) -> str | None:
    """Why pages cannot stand for the cache: its attention has to be causal, of all tokens, and read the cache as it is.

    Returns:
        The reason, None where there is none.
    """
    fact, args = cache_mask(site, edit), arguments(site.attention)
    reads = (site.key_write, site.value_write) if site.reads == "cache" else (site.new_key, site.new_value)
    if (args["key"], args["value"]) != reads:
        return "the attention reads the cache's heads repeated"
    if site.reads == "cache" and (fact.kind != "cache_causal" or fact.positions is not site.positions):
        return f"the mask is not causal in the positions that are written: {fact.reason or fact.kind}"
    if site.reads == "new" and fact.kind not in ("cache_causal", "causal"):
        return f"the mask over the new tokens is not causal: {fact.reason or fact.kind}"
    if fact.window is not None:
        return f"the attention reads no more than its last {fact.window} tokens as it is"
    if fact.padding is not None and not fact.starts:
        return "the mask hides padding by a mark for each key; only where a sequence starts can be kept"
    return None
