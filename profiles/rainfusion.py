"""RainFusion (Huawei 2025): each head is typed online as temporal, spatial or textural, and attends as its type does.

Version 1 samples two small attention maps a head in each call, the tokens of one frame and every (T-1)-th token, and
compares how much of their mass lies in a band (ARM). Temporal heads attend to a band in (h, w, t) order, spatial heads
to a band in (t, h, w) order, textural heads to every tau-th key. `adaptive_bandwidth` is RainFusion+: each head takes
the narrowest of three bands that holds. Version 2 has no types: every query block keeps the key blocks whose means
score highest. The first frame and text are always dense.

When it pays: long sequences (tens of thousands of tokens on a GPU, thousands on a CPU). It needs no calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ..kernels.block_lists import density
from ..kernels.head_patterns import bandwidth_of, head_patterns, tau_of
from .method import Context
from .video import Place, Proposal, VideoMethod

_ADAPTIVE = (0.125, 0.25, 0.5)
"""RainFusion+: the bandwidths among which a head finds the narrowest that holds (arXiv 2505.21036)."""
_LEAST_BLOCKS = 32
"""Version 2 leaves shorter videos dense (its public code)."""


class RainFusion(VideoMethod):
    """Type heads online and attend sparsely."""

    name: ClassVar[str] = "rainfusion"
    reference: ClassVar[str] = "RainFusion: arXiv 2505.21036; RainFusion 2.0: arXiv 2512.24086"
    rewrites: ClassVar[str] = "video self-attention, typed online"

    sparsity: float | None = Field(
        None, gt=0, lt=1, description="Share of the score map to leave out; 0.5 for version 1 and 0.8 for version 2."
    )
    version: Literal[1, 2] = Field(1, description="1 types heads, 2 keeps the best blocks.")
    alpha: float = Field(0.9, ge=0, le=1, description="Version 1: a band holds from this recall on.")
    adaptive_bandwidth: bool = Field(False, description="Version 1: each head takes the narrowest band that holds.")
    textural: bool = Field(True, description="Version 1: without it there are temporal and spatial heads only.")

    def propose(self, places: Sequence[Place], context: Context) -> Mapping[str, Proposal | str]:
        """The same at every place: the heads decide when the program runs."""
        make = self._typed if self.version == 1 else self._top_blocks
        return {place.site.id: make(place) for place in places}

    @property
    def wanted(self) -> float:
        """The sparsity, by default that of the version."""
        return self.sparsity if self.sparsity is not None else (0.5 if self.version == 1 else 0.8)

    def _options(self, place: Place) -> dict[str, Any]:
        layout = place.layout
        frames = layout.frames if isinstance(layout.frames, int) else None
        return {"grid": [frames, layout.height, layout.width], "block_size": self.block_of(place.tokens)}

    def _typed(self, place: Place) -> Proposal | str:
        bandwidths = _ADAPTIVE if self.adaptive_bandwidth else (bandwidth_of(self.wanted),)
        options = self._options(place) | {
            "bandwidths": list(bandwidths),
            "tau": tau_of(self.wanted),
            "alpha": self.alpha,
            "textural": self.textural,
        }
        layout, tokens = place.layout, place.tokens
        if tokens is None:
            return Proposal("route_heads", options, None)
        frames, block = int(layout.frames), options["block_size"]
        if frames < 2:
            return "there is one frame only, and the first is protected"
        rest = (frames - 1) * layout.height * layout.width
        if rest < block:
            return f"{rest} tokens after the first frame are less than a block of {block}"
        _, counts, _ = head_patterns(
            frames,
            layout.height,
            layout.width,
            first=int(layout.first),
            text=int(layout.text),
            block_size=block,
            bandwidths=tuple(bandwidths),
            tau=options["tau"],
        )
        rows = [density(row[None], rest // block, tokens, tokens, block) for row in counts]
        # Which row a head takes is not known yet: the densest that can come.
        return Proposal("route_heads", options, max(rows if self.textural else rows[:-1]))

    def _top_blocks(self, place: Place) -> Proposal | str:
        layout, tokens = place.layout, place.tokens
        if tokens is None or not isinstance(layout.frames, int):
            return "version 2 needs a static length: the number of kept blocks is a size of the graph"
        options = self._options(place) | {"sparsity": self.wanted}
        block = self.block_of(tokens)
        size = (layout.frames - 1) * layout.height * layout.width // block
        if size < _LEAST_BLOCKS:
            return f"{size} blocks of {block} after the first frame, version 2 starts at {_LEAST_BLOCKS}"
        kept = math.ceil(size * (1 - self.wanted))
        counts = torch.full((1, size), kept, dtype=torch.int32)
        return Proposal("keep_top_blocks", options, density(counts, size, tokens, tokens, block))
