"""All sites of a program at once: what `inspect` shows and what methods choose from."""

from __future__ import annotations

from dataclasses import dataclass

from .attention import AttentionSite, find_attention
from .cache import CacheSite, find_caches
from .graph import GraphView, Refusal
from .linear import LinearSite, find_linears
from .norm import NormSite, find_norms
from .site import Site


@dataclass(frozen=True)
class Sites:
    """The sites of one phase, by family, and what nearly was one."""

    phase: str
    attention: tuple[AttentionSite, ...]
    linear: tuple[LinearSite, ...]
    cache: tuple[CacheSite, ...]
    norm: tuple[NormSite, ...]
    refusals: dict[str, tuple[Refusal, ...]]
    """Family -> refusals, in graph order."""

    @property
    def all(self) -> tuple[Site, ...]:
        """Every site, family by family."""
        return (*self.attention, *self.linear, *self.cache, *self.norm)

    def nearest_miss(self, family: str) -> Refusal | None:
        """The refusal that came furthest, None where nothing was refused."""
        return max(self.refusals.get(family, ()), key=lambda refusal: refusal.depth, default=None)


def find_sites(view: GraphView, phase: str = "main") -> Sites:
    """Match every family on a canonical program."""
    attention, linear = find_attention(view, phase), find_linears(view, phase)
    cache, norm = find_caches(view, phase), find_norms(view, phase)
    refusals = {
        "attention": attention.refusals,
        "linear": linear.refusals,
        "cache": cache.refusals,
        "norm": norm.refusals,
    }
    return Sites(phase, attention.sites, linear.sites, cache.sites, norm.sites, refusals)
