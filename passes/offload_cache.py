"""Keep a budget of pages of a key-value cache at hand, and all of it in a slow memory.

    decode    cache' = index_copy(cache, 2, at, k)       pages' = graphwright.page_append(pages, at, k, v)
              sdpa(q, keys', values', mask) ── y         graphwright.page_recall(pages', q)      now, what q turned to
                                                         graphwright.paged_attention(q, pages') ── y
                                               becomes   graphwright.page_recall(pages', q)      ahead, for the next
    extend                                               page_append, sdpa(q, *graphwright.page_gather(pages'), mask),
                                                         page_recall ahead
    prefill   sdpa(q, k, v) ── y                         page_append, page_recall ahead, sdpa(q, k, v) ── y

The buffers [B, H, L, D] go. In their place are, for keys and values together, a fast pool of `budget` tokens, a slow
pool of all (a file's, once the program runs: `offload.py`), summaries of pages, tables, counts and the last query:
`kernels/page_append.py` says how they lie. A prefill offloads layer by layer, and a call that extends the cache by
several tokens looks at all of it, one layer's at a time.

With `offload` off nothing moves: the whole cache stays in its buffers, and graphwright.retrieved_attention computes
what decoding would give, for several tokens in a call as well. That is the measure of the rest, and the quick way to
evaluate it.

Source: FreeKV (Liu et al. 2025, arXiv 2505.13109), section 4.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import page_append, page_gather, page_recall, paged_attention, retrieved_attention
from ..kernels.contract import Spec
from ..kernels.page_scores import POOLINGS
from ..kernels.page_tables import Count
from ..kernels.paging import Paging
from ..kernels.slow_pool import nowhere
from ..patterns.attention_forms import SDPA
from ..patterns.cache import CacheSite
from ..patterns.nodes import arguments, aten, shape_of
from .base import SitePass
from .cache_mask import cache_mask, refuse_cache_mask
from .edit import Edit

ops = torch.ops.graphwright


@dataclass(frozen=True)
class OffloadCache(SitePass[CacheSite]):
    """Offload the cache of one attention.

    Attributes:
        budget: Tokens at hand, sinks and window included.
        page: Tokens of a page.
        sinks, window: First and last tokens that are always at hand; whole pages of them.
        tau: Heads whose queries have a mean cosine below it with those of the step before wait for their own choice of
            pages. None: none ever does; above 1: all always do.
        pooling: How the query heads that share a key head choose together; see `kernels/page_scores.py`.
        scaled: Divide scores by sqrt(head_dim) before their softmax.
        offload: Whether pages move; without, the cache stays in memory and attention looks at what it would look at.
    """

    name: ClassVar[str] = "offload_cache"
    changes_state: ClassVar[bool] = True

    budget: int = 2048
    page: int = 32
    sinks: int = 128
    window: int = 128
    tau: float | None = 0.8
    pooling: str = "mean_softmax"
    scaled: bool = False
    offload: bool = True

    def guard(self, site: CacheSite, edit: Edit) -> str | None:
        """A static cache with equal heads of keys and values, a causal mask, and the operators' contracts."""
        if self.pooling not in POOLINGS:
            return f"unknown pooling {self.pooling!r}; there are {', '.join(POOLINGS)}"
        if site.length is None:
            return "the cache grows, there is no buffer of a fixed size to offload"
        if not isinstance(site.positions, Node):
            return "the positions of the new tokens are not given as a tensor"
        if site.head_dim != site.value_head_dim:
            return f"keys have {site.head_dim} features and values {site.value_head_dim}, expected as many"
        if self.page < 1:
            return f"got pages of {self.page} tokens, expected at least 1"
        reason = self.paging(site).refuse()
        return reason or refuse_cache_mask(site, edit) or self._wrong_operands(site, edit)

    def _wrong_operands(self, site: CacheSite, edit: Edit) -> str | None:
        names = {"query": _query(site), "positions": site.positions, "starts": _starts(site, edit)}
        given = {name: _value(node) for name, node in names.items()}
        news = {"key": _value(site.new_key), "value": _value(site.new_value)}
        if not given["query"].dtype == news["key"].dtype == site.dtype:
            return f"got queries of {given['query'].dtype} and a cache of {site.dtype}, expected one dtype"
        if not self.offload:
            given |= {"key": _value(site.key_buffer), "value": _value(site.value_buffer)}
            return retrieved_attention.CONTRACT.check(**given, **self._query_state(site))
        device = _value(site.key_buffer).device
        steps = [page_append, page_recall]
        if site.reads == "cache":
            steps.append(paged_attention if self._is_one(site) else page_gather)
        given |= news | self._specs(site)
        for step in steps:
            taken: dict[str, Any] = {name: given[name] for name in step.CONTRACT.arguments}
            reason = step.CONTRACT.check(device=device, **taken)
            if reason is not None:
                return reason
        return None

    def rewrite(self, site: CacheSite, edit: Edit) -> None:
        """Pages instead of buffers, or the whole cache and what retrieval would see of it."""
        if self.offload:
            self._offload(site, edit)
        else:
            self._retrieve(site, edit)

    def _offload(self, site: CacheSite, edit: Edit) -> None:
        buffers = {
            name: edit.state(f"{site.key_name}.{name}", lambda name=name: self._empty(site, name))
            for name in self._specs(site)
        }
        state = self._appended(site, edit, buffers)
        if site.reads == "cache" and self._is_one(site):
            state = self._recalled(site, edit, state, ahead=False)
            operands = (_query(site), state["fast"], state["tables"], site.positions, _starts(site, edit), _scale(site))
            edit.replace(site.attention, edit.call(ops.paged_attention.default, *operands, like=site.attention))
        elif site.reads == "cache":
            self._attend_to_all(site, edit, state)
        state = self._recalled(site, edit, state, ahead=True)
        edit.keep(site.key_write, buffers["fast"], state["fast"])
        edit.keep(site.value_write, buffers["slow"], state["slow"])
        for name in ("summary", "tables", "counts", "previous"):
            edit.keep_too(buffers[name], state[name])

    def _appended(self, site: CacheSite, edit: Edit, state: dict[str, Node]) -> dict[str, Node]:
        """The state after the new tokens came."""
        paging, names = self.paging(site), ("fast", "slow", "summary", "tables", "counts")
        new = (site.positions, site.new_key, site.new_value, _starts(site, edit))
        operands = (*(state[name] for name in names), *new, paging.sinks, paging.window)
        return state | self._results(site, edit, ops.page_append.default, operands, names)

    def _recalled(self, site: CacheSite, edit: Edit, state: dict[str, Node], *, ahead: bool) -> dict[str, Node]:
        """The state after pages were chosen by the last query."""
        paging, names = self.paging(site), ("fast", "tables", "previous", "counts")
        read = (state["slow"], state["summary"], _query(site), site.positions, _starts(site, edit))
        how = (paging.sinks, paging.window, self.threshold, self.pooling, self.scaled, ahead)
        operands = (*(state[name] for name in names), *read, *how)
        return state | self._results(site, edit, ops.page_recall.default, operands, names)

    def _attend_to_all(self, site: CacheSite, edit: Edit, state: dict[str, Node]) -> None:
        """The attention as it was, over the whole cache, which is put together for this call."""
        operands = (state["slow"], state["fast"], state["tables"], site.positions, site.length)
        whole = self._results(site, edit, ops.page_gather.default, operands, ("key", "value"))
        args = arguments(site.attention)
        output = edit.call(
            SDPA,
            *(args["query"], whole["key"], whole["value"], args["attn_mask"], 0.0, args["is_causal"]),
            scale=args["scale"],
            enable_gqa=args["enable_gqa"],
            like=site.attention,
        )
        edit.replace(site.attention, output)

    def _retrieve(self, site: CacheSite, edit: Edit) -> None:
        buffers = {
            name: edit.state(f"{site.key_name}.{name}", lambda spec=spec: _zeros(spec, site))
            for name, spec in self._query_state(site).items()
        }
        query, like = _query(site), site.attention
        if site.reads == "new":
            last = edit.call(aten.select.int, query, 2, -1, like=like)
            state = {"previous": edit.call(aten.clone.default, last, like=like)}
            position = edit.call(aten.slice.Tensor, site.positions, 0, -1, like=like)
            state["known"] = edit.call(aten.add.Tensor, position, 1, like=like)
        else:
            paging = self.paging(site)
            operands = (query, site.key_write, site.value_write, site.positions, buffers["previous"], buffers["known"])
            pages = (paging.page, paging.slots, paging.sinks, paging.window)
            how = (_starts(site, edit), *pages, self.threshold, self.pooling, self.scaled, _scale(site))
            names = ("output", "previous", "known")
            state = self._results(site, edit, ops.retrieved_attention.default, (*operands, *how), names)
            edit.replace(site.attention, state["output"])
        for name, buffer in buffers.items():
            edit.keep_too(buffer, state[name])

    def _results(
        self, site: CacheSite, edit: Edit, target: Any, operands: tuple[Any, ...], names: tuple[str, ...]
    ) -> dict[str, Node]:
        """What a call gives, by name."""
        call = edit.call(target, *operands, like=site.attention)
        return {name: edit.call(operator.getitem, call, place, like=site.attention) for place, name in enumerate(names)}

    @property
    def threshold(self) -> float:
        """`tau` as operators take it."""
        return -1.0 if self.tau is None else float(self.tau)

    def paging(self, site: CacheSite) -> Paging:
        """The budget in pages; slots that no page could fill are left out."""
        sinks, window, pages = (-(-tokens // self.page) for tokens in (self.sinks, self.window, site.length or 0))
        return Paging(self.page, min(self.budget // self.page, max(pages, sinks + window + 1)), sinks, window)

    def _specs(self, site: CacheSite) -> dict[str, Spec]:
        """The state of an offloaded cache."""
        paging = self.paging(site)
        batch, heads, _, dim = shape_of(site.key_buffer)
        pages, page, slots = paging.pages_for(site.length or 0), paging.page, paging.slots
        return {
            "fast": Spec((batch, slots, 2, page, heads, dim), site.dtype),
            "slow": Spec((batch, pages, heads, 2, page, dim), site.dtype),
            "summary": Spec((batch, heads, pages, 2, dim), site.dtype),
            "tables": Spec((batch, heads, slots + pages), torch.int32),
            "counts": Spec((len(Count),), torch.int64),
            "previous": self._query_state(site)["previous"],
        }

    def _query_state(self, site: CacheSite) -> dict[str, Any]:
        """What is kept of the last query: itself, and the position that it is previous to."""
        batch, heads, _, dim = shape_of(_query(site))
        return {"previous": Spec((batch, heads, dim), site.dtype), "known": Spec((1,), torch.int64)}

    def _empty(self, site: CacheSite, name: str) -> Tensor:
        """The state of an empty cache."""
        spec = self._specs(site)[name]
        if name == "slow":
            return nowhere(spec, site.key_buffer.meta["val"].device)
        return _zeros(spec, site).fill_(-1 if name == "tables" else 0)

    def _is_one(self, site: CacheSite) -> bool:
        return shape_of(_query(site))[2] == 1


def _query(site: CacheSite) -> Node:
    return arguments(site.attention)["query"]


def _starts(site: CacheSite, edit: Edit) -> Node | None:
    return cache_mask(site, edit).padding


def _scale(site: CacheSite) -> float:
    scale = arguments(site.attention)["scale"]
    return float(site.head_dim**-0.5 if scale is None else scale)


def _zeros(spec: Spec, site: CacheSite) -> Tensor:
    return torch.zeros(tuple(spec.shape), dtype=spec.dtype, device=site.key_buffer.meta["val"].device)


def _value(node: Node | None) -> Any:
    return None if node is None else node.meta["val"]
