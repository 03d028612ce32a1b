"""Keep keys and values in 8, 4 or 2 bits.

    cache' = index_copy(cache, 2, at, k)               store' = graphwright.cache_append(store, at, k, bits, form)
    sdpa(q, keys', values', mask) ── y     becomes     graphwright.quantized_cache_attention(q, keys', values', at) ── y
    cache := cache'                                    store := store'

for the key and the value side of one attention. A buffer float [B, H, L, D] becomes a store uint8 [B, H, R] that holds
the packed tokens with their scales and minima; new tokens are quantized once, when they are written. Where the
attention reads the new tokens and not the cache, as in a prefill, it goes on doing so: only what is kept changes. Where
the mask hides the padding before each sequence's start, the operator is given the starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import cache_append, quantized_cache_attention
from ..kernels.contract import Spec
from ..kernels.packed_cache import FORMS, Packing
from ..patterns.cache import CacheSite
from ..patterns.nodes import arguments, shape_of
from .base import SitePass
from .cache_mask import cache_mask
from .edit import Edit


@dataclass(frozen=True)
class QuantizeCache(SitePass[CacheSite]):
    """Pack the keys and values of one attention.

    Attributes:
        key_bits, value_bits: 8, 4 or 2.
        mode: `per_token` (one scale and minimum for a token) or `kivi` (keys by channel over 32 tokens, values by 32
            channels of a token, the last block of 32 tokens in float16); see `kernels/packed_cache.py`.
    """

    name: ClassVar[str] = "quantize_cache"
    changes_state: ClassVar[bool] = True

    key_bits: int = 8
    value_bits: int = 8
    mode: str = "per_token"

    def guard(self, site: CacheSite, edit: Edit) -> str | None:
        """A static cache, a mask that is causal in the positions that are written, and the operators' contracts."""
        if self.mode not in FORMS:
            return f"unknown mode {self.mode!r}; there are {', '.join(FORMS)}"
        if site.length is None:
            return "the cache grows, there is no buffer of a fixed size to pack"
        if not isinstance(site.positions, Node):
            return "the positions of the new tokens are not given as a tensor"
        keys_as, values_as = self._packings(site)
        reason = keys_as.refuse() or values_as.refuse()
        if reason is not None:
            return reason
        batch = shape_of(site.key_buffer)[0]
        store = Spec((batch, site.kv_heads, keys_as.bytes_for(site.length)), torch.uint8)
        reason = cache_append.CONTRACT.check(
            store=store, positions=_spec(site.positions), new=_spec(site.new_key), bits=self.key_bits
        )
        if reason is not None or site.reads == "new":
            return reason
        fact = cache_mask(site, edit)
        if fact.kind != "cache_causal" or fact.positions is not site.positions:
            return f"the mask is not causal in the positions that are written: {fact.reason or fact.kind}"
        if fact.padding is not None and not fact.starts:
            return "the mask hides padding by a mark for each key; only where a sequence starts can be kept"
        return quantized_cache_attention.CONTRACT.check(
            query=_spec(arguments(site.attention)["query"]),
            key=store,
            value=Spec((batch, site.kv_heads, values_as.bytes_for(site.length)), torch.uint8),
            positions=_spec(site.positions),
            starts=None if fact.padding is None else _spec(fact.padding),
            value_dim=site.value_head_dim,
        )

    def rewrite(self, site: CacheSite, edit: Edit) -> None:
        """Keep packed stores instead of the buffers, and let the attention read them."""
        query = arguments(site.attention)["query"]
        output = self.pack(site, edit, query, (site.new_key, site.new_value))
        if output is not None:
            edit.replace(site.attention, output)

    def pack(self, site: CacheSite, edit: Edit, query: Node, new: tuple[Node, Node]) -> Node | None:
        """Keep packed stores of new keys and values instead of what the site keeps.

        Args:
            site: Whose cache it is.
            edit: Where it is done.
            query: [B, Hq, N, D], all queries of the site or those of some heads.
            new: The keys and values of the same heads.

        Returns:
            The attention of the queries to the packed cache; None where the site's attention does not read its cache.
        """
        names, writes = (site.key_name, site.value_name), (site.key_write, site.value_write)
        halves = zip(names, writes, new, self._packings(site), strict=True)
        stores = [self._store(site, edit, *half) for half in halves]
        if site.reads == "new":
            return None
        node, fact = site.attention, cache_mask(site, edit)
        scale = arguments(node)["scale"]
        padding = () if fact.padding is None else (fact.padding,)
        return edit.call(
            torch.ops.graphwright.quantized_cache_attention.default,
            query,
            *stores,
            site.positions,
            self.key_bits,
            self.value_bits,
            self.mode,
            site.value_head_dim,
            float(site.head_dim**-0.5 if scale is None else scale),
            fact.window or 0,
            *padding,
            like=node,
        )

    def _packings(self, site: CacheSite) -> tuple[Packing, Packing]:
        key_form, value_form = FORMS[self.mode]
        return (
            Packing(self.key_bits, key_form, site.head_dim),
            Packing(self.value_bits, value_form, site.value_head_dim),
        )

    def _store(self, site: CacheSite, edit: Edit, name: str, write: Node, new: Node, packing: Packing) -> Node:
        """The store after the new tokens were appended."""
        batch, heads, length = shape_of(site.key_buffer)[0], shape_of(new)[1], site.length
        device = write.meta["val"].device
        assert length is not None

        def empty() -> Tensor:
            return torch.zeros(batch, heads, packing.bytes_for(length), dtype=torch.uint8, device=device)

        store = edit.state(f"{name}.{packing.form}{packing.bits}", empty)
        appended = edit.call(
            torch.ops.graphwright.cache_append.default,
            store,
            site.positions,
            new,
            packing.bits,
            packing.form,
            like=write,
            before=site.attention,
        )
        edit.keep(write, store, appended)
        return appended


def _spec(node: Node) -> Any:
    return node.meta["val"]
