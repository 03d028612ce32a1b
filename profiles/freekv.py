"""FreeKV (SJTU and Huawei, ICLR 2026): a whole key-value cache in slow memory, a budget of its pages at hand.

Nothing is dropped and nothing is trained. Neighbouring queries of a text are alike, so the pages that a step's query
would choose are fetched while the rest of the step is computed, and the next step attends to them. Heads whose query
has turned away (mean cosine below `tau`) wait for a choice of their own. Sinks and a window of recent tokens are always
at hand. What is done when: `passes/offload_cache.py`.

When it pays: with caches that do not fit the memory that attention is quick on. Where they do fit, it costs time.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..kernels.page_scores import Pooling
from ..passes.decision import Decision
from ..passes.offload_cache import OffloadCache
from ..patterns.cache import CacheSite
from ..patterns.nodes import shape_of
from .method import Context, Method


class FreeKV(Method):
    """Keep a budget of the cache's pages at hand and fetch others ahead of the step that needs them."""

    name: ClassVar[str] = "freekv"
    reference: ClassVar[str] = "FreeKV: Liu et al. 2025, arXiv 2505.13109"
    rewrites: ClassVar[str] = "KV cache, pages in slow memory that are fetched ahead"

    budget: int = Field(2048, ge=1, description="Tokens at hand for each head, sinks and window included.")
    page: int = Field(32, ge=1, description="Tokens of a page.")
    sinks: int = Field(128, ge=0, description="First tokens that are always at hand.")
    window: int = Field(128, ge=1, description="Recent tokens that are always at hand.")
    tau: float | None = Field(
        0.8, description="Heads with a lower cosine of neighbouring queries wait. None: no head; above 1: every head."
    )
    dense_layers: int = Field(1, ge=0, description="First layers whose cache is left as it is.")
    pooling: Pooling = Field("mean_softmax", description="How query heads that share a key head choose together.")
    scaled: bool = Field(False, description="Divide scores by sqrt(head_dim) before their softmax.")
    offload: bool = Field(True, description="False: the cache stays in memory, to evaluate what would be computed.")

    def decide(self, context: Context) -> list[Decision]:
        """One decision a cache site; a place is treated alike in every phase."""
        places = context.cache_places("FreeKV")
        return [self._decision(site, places) for sites in context.sites.values() for site in sites.cache]

    def _decision(self, site: CacheSite, places: list[str]) -> Decision:
        decision = Decision(
            site=site.id, method=self.name, pass_name=OffloadCache.name, facts=site.describe(), reason=""
        )
        reason = ""
        if site.place not in places:
            reason = "the layer's cache was not found in every phase"
        elif places.index(site.place) < self.dense_layers:
            reason = f"the first {self.dense_layers} layers keep their cache as it is"
        elif site.length is None:
            reason = "the cache grows, there is no buffer of a fixed size to offload"
        if reason:
            return decision.model_copy(update={"status": "refused", "reason": reason})
        options = self.model_dump(exclude={"dense_layers"})
        facts = decision.facts | _bytes(site, OffloadCache(**options))
        return decision.model_copy(update={"options": options, "facts": facts})


def _bytes(site: CacheSite, step: OffloadCache) -> dict[str, str]:
    """Bytes of the site's buffers, and of what stays in memory of them."""
    value = site.key_buffer.meta["val"]
    batch, heads, length, _ = shape_of(site.key_buffer)
    paging = step.paging(site)
    a_token = value.element_size() * (site.head_dim + site.value_head_dim) * batch * heads
    at_hand = a_token * (paging.slots * paging.page + paging.pages_for(length))
    full = a_token * length
    return {"full bytes": str(full), "bytes at hand": str(at_hand if step.offload else full)}
