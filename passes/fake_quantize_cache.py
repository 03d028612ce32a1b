"""Quantize keys and values where they are written to the cache.

    new_key ── index_copy(cache)           becomes      new_key ── graphwright.fake_quantize ── index_copy(cache)
    new_key ── sdpa                        becomes      new_key ── graphwright.fake_quantize ── sdpa

The attention of a prefill, which reads the new keys and not the cache, reads the quantized ones too, so that a text
gives the same numbers however it is cut into calls. The cache keeps its dtype: this shows a cache's quality at few
bits, it does not make it smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..kernels import fake_quantize
from ..patterns.cache import CacheSite
from .base import SitePass
from .edit import Edit


@dataclass(frozen=True)
class FakeQuantizeCache(SitePass[CacheSite]):
    """Keys and values of few bits, asymmetric, in groups of a head's channels.

    Attributes:
        key_bits, value_bits: 2 to 8.
        group: Channels that share a step and a zero point; must divide the head.
        clip: Share of a group's range that is kept.
    """

    name: ClassVar[str] = "fake_quantize_cache"

    key_bits: int = 4
    value_bits: int = 4
    group: int = 64
    clip: float = 1.0

    def guard(self, site: CacheSite, edit: Edit) -> str | None:
        """The contract of `graphwright::fake_quantize`, for both."""
        if not 0 < self.clip <= 1:
            return f"got clip={self.clip}, expected a share in (0, 1]"
        for node, bits in ((site.new_key, self.key_bits), (site.new_value, self.value_bits)):
            reason = fake_quantize.CONTRACT.check(x=node.meta["val"], bits=bits, group=self.group)
            if reason is not None:
                return reason
        return None

    def rewrite(self, site: CacheSite, edit: Edit) -> None:
        """Everything that reads the new keys and values reads their quantized form."""
        for node, bits in ((site.new_key, self.key_bits), (site.new_value, self.value_bits)):
            source = edit.current(node)
            rounded = edit.call(
                torch.ops.graphwright.fake_quantize.default,
                source,
                bits,
                self.group,
                self.clip,
                like=source,
                before=source.next,
            )
            edit.replace(source, rounded)
