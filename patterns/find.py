"""All sites of a program at once: what `inspect` shows and what methods choose from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .attention import AttentionSite, find_attention
from .block_site import BlockSite, find_blocks
from .cache import CacheSite, find_caches
from .graph import GraphView, Refusal
from .linear import LinearSite, find_linears
from .norm import NormSite, find_norms
from .residual import ResidualStream, find_streams
from .site import Found, Site


@dataclass(frozen=True)
class Sites:
    """The sites of one phase, by family, and what nearly was one."""

    phase: str
    attention: tuple[AttentionSite, ...]
    linear: tuple[LinearSite, ...]
    cache: tuple[CacheSite, ...]
    norm: tuple[NormSite, ...]
    residual: tuple[ResidualStream, ...]
    refusals: dict[str, tuple[Refusal, ...]]
    """Family -> refusals, in graph order."""
    block: tuple[BlockSite, ...] = ()

    @property
    def all(self) -> tuple[Site, ...]:
        """Every site, family by family."""
        return (*self.attention, *self.linear, *self.cache, *self.norm, *self.residual, *self.block)

    def nearest_miss(self, family: str) -> Refusal | None:
        """The refusal that came furthest, None where nothing was refused."""
        return max(self.refusals.get(family, ()), key=lambda refusal: refusal.depth, default=None)


FAMILIES = ("attention", "linear", "cache", "norm", "residual")
"""What is looked for unless told otherwise; blocks are looked for in denoisers."""


def find_sites(view: GraphView, phase: str = "main", families: Collection[str] = FAMILIES) -> Sites:
    """Match families on a canonical program.

    Args:
        view: The graph.
        phase: Its name, first part of the sites' ids.
        families: Which to look for; the others come out empty.
    """
    attention = find_attention(view, phase) if "attention" in families else Found[AttentionSite](())
    linear = find_linears(view, phase) if "linear" in families else Found[LinearSite](())
    cache = find_caches(view, phase) if "cache" in families else Found[CacheSite](())
    norm = find_norms(view, phase) if "norm" in families else Found[NormSite](())
    residual = find_streams(view, phase) if "residual" in families else Found[ResidualStream](())
    block = find_blocks(view, phase) if "block" in families else Found[BlockSite](())
    refusals = {
        "attention": attention.refusals,
        "linear": linear.refusals,
        "cache": cache.refusals,
        "norm": norm.refusals,
        "residual": residual.refusals,
    }
    if "block" in families:
        refusals["block"] = block.refusals
    return Sites(phase, attention.sites, linear.sites, cache.sites, norm.sites, residual.sites, refusals, block.sites)
