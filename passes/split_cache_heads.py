"""Keep the whole cache of some heads only; the others keep their first and last tokens, and a mean of the rest.

    k' = index_copy(K, 2, at, k)             KP' = index_copy(KP, 2, at, k[P])         KP: a buffer of the kept heads P
    sdpa(q, k', v', mask) ── y               sdpa(q[P], KP', VP', mask) ──────────────────────────┐
    K := k'                        becomes                                                       cat ── y
                                             window_cache_attention(q[W], SK, SV, k[W], v[W], at) ┘
                                             SK' = window_cache_append(SK, at, k[W])   SK: sinks, ring, mean of heads W
                                             KP := KP',  SK := SK'

and the same for values. The buffer of all heads is gone: what is kept are [B, P, L, D] and [B, W, S, D] with S much
smaller than L. Where the attention reads the new tokens and not the cache, as in a prefill, both groups of heads go on
attending to all of them, and only what is kept changes. The kept heads' attention is an attention over a static cache
like any other, so it can be packed like any other.

Of a mask that adds ALiBi's slopes the kept heads get their part, and the others' operator gets their slopes. What those
heads drop should be too far back to matter (`profiles/alibi_reach.py`), so there is no mean of it.

Source: RazorAttention (Tang et al. 2024, arXiv 2407.15891), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import window_cache_append, window_cache_attention
from ..kernels.contract import Spec
from ..kernels.window_cache import slots_for
from ..patterns.attention_forms import SDPA
from ..patterns.cache import CacheSite
from ..patterns.masks import MaskFact
from ..patterns.nodes import arguments, aten, shape_of
from .base import SitePass
from .cache_mask import cache_mask
from .edit import Edit
from .quantize_cache import QuantizeCache


@dataclass(frozen=True)
class SplitCacheHeads(SitePass[CacheSite]):
    """Split the cache of one attention by key-value heads.

    Attributes:
        keep: The heads that keep every token.
        sinks: First tokens that the others keep.
        window: Last tokens that the others keep.
        compensate: Whether the mean of what they dropped stands in for it.
        pack: Options of `QuantizeCache` where the kept heads' cache is to be packed (KVTuner); empty for none.
    """

    name: ClassVar[str] = "split_cache_heads"
    changes_state: ClassVar[bool] = True
    absorbs: ClassVar[Mapping[str, str]] = {"quantize_cache": "pack"}

    keep: Sequence[int] = ()
    sinks: int = 4
    window: int = 4000
    compensate: bool = True
    pack: Mapping[str, Any] = field(default_factory=dict)

    def guard(self, site: CacheSite, edit: Edit) -> str | None:
        """A static cache, heads that can be told apart, a causal mask, and the operators' contracts."""
        if site.length is None:
            return "the cache grows, there is no buffer of a fixed size to split"
        if not isinstance(site.positions, Node):
            return "the positions of the new tokens are not given as a tensor"
        reason = self._wrong_heads(site) or self._wrong_mask(site, edit) or self._wrong_operands(site, edit)
        if reason is None and self.pack:
            reason = QuantizeCache(**self.pack).guard(site, edit)
        return reason

    def _wrong_heads(self, site: CacheSite) -> str | None:
        assert site.length is not None
        unknown = [head for head in self.keep if not 0 <= head < site.kv_heads]
        if unknown:
            return f"head {unknown[0]} is to be kept, the cache has heads 0 to {site.kv_heads - 1}"
        if len(set(self.keep)) == site.kv_heads:
            return "every head keeps the whole cache, there is nothing to split"
        if self.sinks < 0 or self.window < 1:
            return f"got {self.sinks} sinks and a window of {self.window}, expected at least 0 and 1"
        slots = slots_for(self.sinks, self.window, site.dtype)
        if slots >= site.length:
            return f"sinks, window and mean take {slots} slots, the whole cache {site.length}; give a smaller window"
        args = arguments(site.attention)
        heads = shape_of(args["query"])[1]
        if heads % site.kv_heads:
            return f"heads cannot be split: {heads} query heads are no multiple of {site.kv_heads} key heads"
        reads = (site.key_write, site.value_write) if site.reads == "cache" else (site.new_key, site.new_value)
        if (args["key"], args["value"]) != reads:
            return "heads cannot be split: the attention reads the cache's heads repeated"
        return None

    def _wrong_mask(self, site: CacheSite, edit: Edit) -> str | None:
        fact = cache_mask(site, edit)
        kinds = ("cache_causal", "cache_alibi")
        if site.reads == "cache" and (fact.kind not in kinds or fact.positions is not site.positions):
            return f"the mask is not causal in the positions that are written: {fact.reason or fact.kind}"
        if site.reads == "new" and fact.kind not in (*kinds, "causal", "alibi"):
            return f"the mask over the new tokens is not causal: {fact.reason or fact.kind}"
        if fact.window is not None:
            return f"the attention reads no more than its last {fact.window} tokens as it is"
        if fact.padding is not None and not fact.starts:
            return "the mask hides padding by a mark for each key; only where a sequence starts can be kept"
        if fact.slopes and self.compensate:
            return "the mask adds slopes over the keys, and the mean of dropped tokens has no position; leave it out"
        if fact.slopes and site.key_buffer.meta["val"].device.type == "cuda":
            return "the mask adds slopes over the keys, which window_cache_attention takes on the CPU only"
        mask = arguments(site.attention)["attn_mask"]
        if not fact.slopes and mask is not None and len(shape_of(mask)) > 2 and shape_of(mask)[-3] != 1:
            return "heads cannot be split: the mask is one of each head"
        return None

    def _wrong_operands(self, site: CacheSite, edit: Edit) -> str | None:
        args, starts = arguments(site.attention), _starts(site, edit)
        batch, heads, count, dim = shape_of(args["query"])
        others, dtype = site.kv_heads - len(set(self.keep)), site.dtype
        slots, tokens = slots_for(self.sinks, self.window, dtype), shape_of(site.new_key)[2]
        stores = [Spec((batch, others, slots, d), dtype) for d in (site.head_dim, site.value_head_dim)]
        news = [Spec((batch, others, tokens, store.shape[-1]), dtype) for store in stores]
        rest: dict[str, Any] = {"positions": _value(site.positions), "starts": _value(starts), "sinks": self.sinks}
        for store, new in zip(stores, news, strict=True):
            if (reason := window_cache_append.CONTRACT.check(store=store, new=new, **rest)) is not None:
                return reason
        query = Spec((batch, heads // site.kv_heads * others, count, dim), args["query"].meta["val"].dtype)
        if cache_mask(site, edit).slopes:
            rest["slopes"] = Spec((query.shape[1],), torch.float32)
        return window_cache_attention.CONTRACT.check(
            query=query, key=stores[0], value=stores[1], new_key=news[0], new_value=news[1], **rest
        )

    def rewrite(self, site: CacheSite, edit: Edit) -> None:
        """One attention for the heads that are kept, one for the others, put together in the order of heads."""
        kept = sorted(set(self.keep))
        others = [head for head in range(site.kv_heads) if head not in kept]
        parts = [self._windowed(site, edit, others, bool(kept))]
        if kept:
            parts.insert(0, self._whole(site, edit, kept))
        node = site.attention
        joined = edit.call(aten.cat.default, parts, 1, like=node) if kept else parts[0]
        order = self._queries(site, [*kept, *others])
        if order != sorted(order):
            back = sorted(range(len(order)), key=order.__getitem__)
            joined = edit.call(aten.index_select.default, joined, 1, _indices(edit, back, joined), like=node)
        edit.replace(node, joined)

    def _whole(self, site: CacheSite, edit: Edit, heads: list[int]) -> Node:
        """The attention of the heads that keep every token, over buffers of their own."""
        node, operands = site.attention, []
        news = [_select(edit, new, heads, node) for _, _, _, new in _halves(site)]
        if self.pack:
            query = self._query(site, edit, heads)
            packed = QuantizeCache(**self.pack).pack(site, edit, query, (news[0], news[1]))
            return self._attention(site, edit, heads, news) if packed is None else packed
        for (name, buffer, write, _), tokens in zip(_halves(site), news, strict=True):
            batch, _, length, dim = shape_of(buffer)
            store = _state(edit, f"{name}.kept", (batch, len(heads), length, dim), buffer)
            written = edit.call(aten.index_copy.default, store, 2, site.positions, tokens, like=write, before=node)
            edit.keep(write, store, written)
            operands.append(written if site.reads == "cache" else tokens)
        return self._attention(site, edit, heads, operands)

    def _windowed(self, site: CacheSite, edit: Edit, heads: list[int], besides: bool) -> Node:
        """The attention of the other heads: to what is left of earlier tokens, and to all new ones."""
        node, fact = site.attention, cache_mask(site, edit)
        padding = () if fact.padding is None else (fact.padding,)
        stores, news = [], []
        for name, buffer, _, new in _halves(site):
            batch, _, _, dim = shape_of(buffer)
            slots = slots_for(self.sinks, self.window, site.dtype)
            stores.append(_state(edit, f"{name}.window", (batch, len(heads), slots, dim), buffer))
            news.append(_select(edit, new, heads, node))
        if site.reads == "new":
            output = self._attention(site, edit, heads, news)
        else:
            args = arguments(node)
            scale = float(site.head_dim**-0.5 if args["scale"] is None else args["scale"])
            query = self._query(site, edit, heads)
            last = (fact.padding, self._slopes(site, edit, heads, fact)) if fact.slopes else padding
            output = edit.call(
                torch.ops.graphwright.window_cache_attention.default,
                *(query, *stores, *news, site.positions, self.sinks, scale, self.compensate, *last),
                like=node,
            )
        # After the attention, which reads the stores as they were: so the write can be done in place.
        for (_, _, write, _), store, new in zip(_halves(site), stores, news, strict=True):
            appended = edit.call(
                torch.ops.graphwright.window_cache_append.default,
                *(store, site.positions, new, self.sinks, *padding),
                like=write,
                before=node,
            )
            if besides:
                edit.keep_too(store, appended)
            else:
                edit.keep(write, store, appended)
        return output

    def _attention(self, site: CacheSite, edit: Edit, heads: list[int], operands: list[Node]) -> Node:
        args = arguments(site.attention)
        mask, queries = args["attn_mask"], self._queries(site, heads)
        if mask is not None and len(shape_of(mask)) > 2 and shape_of(mask)[-3] != 1:
            mask = _select(edit, mask, queries, site.attention, dim=len(shape_of(mask)) - 3)
        return edit.call(
            SDPA,
            self._query(site, edit, heads),
            *operands,
            mask,
            0.0,
            args["is_causal"],
            scale=args["scale"],
            enable_gqa=args["enable_gqa"],
            like=site.attention,
        )

    def _query(self, site: CacheSite, edit: Edit, heads: list[int]) -> Node:
        return _select(edit, arguments(site.attention)["query"], self._queries(site, heads), site.attention)

    def _queries(self, site: CacheSite, heads: list[int]) -> list[int]:
        return _of_queries(heads, shape_of(arguments(site.attention)["query"])[1] // site.kv_heads)

    def _slopes(self, site: CacheSite, edit: Edit, heads: list[int], fact: MaskFact) -> Node:
        """The slopes of these heads' queries, a stored tensor."""
        queries, device = self._queries(site, heads), site.key_buffer.meta["val"].device
        slopes = [fact.slopes[head if len(fact.slopes) > 1 else 0] for head in queries]
        name = f"{site.key_name}.slopes." + "_".join(map(str, heads))
        return edit.buffer(name, lambda: torch.tensor(slopes, dtype=torch.float32, device=device))


def _of_queries(heads: list[int], group: int) -> list[int]:
    """The query heads that read key-value heads."""
    return [head * group + i for head in heads for i in range(group)]


def _halves(site: CacheSite) -> tuple[tuple[str, Node, Node, Node], ...]:
    """(name, buffer, write, new tokens) of keys and of values."""
    return (
        (site.key_name, site.key_buffer, site.key_write, site.new_key),
        (site.value_name, site.value_buffer, site.value_write, site.new_value),
    )


def _state(edit: Edit, name: str, sizes: tuple[int, ...], like: Node) -> Node:
    value = like.meta["val"]
    return edit.state(name, lambda: torch.zeros(sizes, dtype=value.dtype, device=value.device))


def _select(edit: Edit, node: Node, heads: list[int], like: Node, dim: int = 1) -> Node:
    """Some heads of [B, H, T, D]: a view where they are neighbours, else a copy."""
    if heads == list(range(heads[0], heads[-1] + 1)):
        return edit.call(aten.slice.Tensor, node, dim, heads[0], heads[-1] + 1, like=like)
    return edit.call(aten.index_select.default, node, dim, _indices(edit, heads, node), like=like)


def _indices(edit: Edit, heads: list[int], like: Node) -> Node:
    device = like.meta["val"].device

    def make() -> Tensor:
        return torch.tensor(heads, device=device)

    return edit.buffer("heads." + "_".join(map(str, heads)), make)


def _starts(site: CacheSite, edit: Edit) -> Node | None:
    return cache_mask(site, edit).padding


def _value(node: Any) -> Any:
    return None if node is None else node.meta["val"]
