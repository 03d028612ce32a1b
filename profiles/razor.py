"""RazorAttention (Huawei, ICLR 2025): only retrieval heads keep the whole key-value cache.

1. Heads are scored once by what they see of earlier copies of random tokens (`retrieval_heads.py`); no text is needed.
2. Of all key-value heads of all layers the best by induction and the best by echo keep every token.
3. The others keep the first tokens (sinks), a window of recent ones, and one token that stands for all that were
   dropped, the mean of their keys and values with the weight of their number (`passes/split_cache_heads.py`).

Heads of models with ALiBi need no scores: from its slope and its weights follows how far back a head sees at all
(`alibi_reach.py`). Those that see no further than the window keep the window, the others every token, and nothing
stands for what is dropped.

When it pays: with contexts much longer than the window. Unlike methods that drop tokens by importance nothing is
decided while the program runs, so any later question can be answered from what the retrieval heads keep.

Buffers have one size, and the published window grows with the text, L = max(window, N / ratio); so N is the length of
the captured cache here. The published window of 4000 tokens is meant for contexts of tens of thousands: for short ones
see `SHORT_CONTEXT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import Tensor

from ..errors import InvalidArgument
from ..kernels.window_cache import slots_for
from ..passes.decision import Decision
from ..patterns.cache import CacheSite
from ..patterns.nodes import shape_of
from .alibi_reach import HeadReach, head_reach
from .calibration import calibration_inputs
from .method import Context, Method
from .retrieval_heads import HeadScores, repeated_tokens, score_heads


class RazorAttention(Method):
    """Keep the whole cache of retrieval heads, and of the others what is first, recent, and a mean of the rest."""

    name: ClassVar[str] = "razor"
    reference: ClassVar[str] = "RazorAttention: Tang et al. 2024, arXiv 2407.15891"
    rewrites: ClassVar[str] = "KV cache, heads that do not retrieve keep a window"

    induction: float = Field(0.14, ge=0, le=1, description="Share of the key-value heads that is kept by induction.")
    echo: float = Field(0.01, ge=0, le=1, description="Share that is kept by echo; heads of both are counted once.")
    sinks: int = Field(4, ge=0, description="First tokens that every head keeps.")
    window: int = Field(4000, ge=1, description="Least number of recent tokens that every head keeps.")
    ratio: float = Field(5, gt=1, description="A head keeps at least the captured length over this of recent tokens.")
    compensate: bool = Field(True, description="Let the mean of the dropped tokens stand in for them; not with ALiBi.")
    eps: float = Field(1e-3, gt=0, lt=1, description="ALiBi: most that a dropped key may weigh in its attention.")
    margin: int = Field(0, ge=0, description="ALiBi: tokens by which a head is taken to see further than was proved.")
    tokens: int = Field(2500, ge=2, description="Random tokens of a draw; less where the captured cache is too short.")
    repeats: int = Field(4, ge=2, description="How often they are repeated.")
    draws: int = Field(1, ge=1, description="Draws whose scores are averaged.")
    seed: int = Field(0, ge=0, description="Of the first draw.")
    heads: tuple[tuple[int, ...], ...] | None = Field(
        None, description="Key-value heads of each layer that keep every token, instead of scores."
    )

    @field_validator("heads")
    @classmethod
    def _no_negative(cls, heads: tuple[tuple[int, ...], ...] | None) -> tuple[tuple[int, ...], ...] | None:
        for layer, kept in enumerate(heads or ()):
            if any(head < 0 for head in kept):
                raise ValueError(f"layer {layer} is to keep head {min(kept)}, heads are counted from 0")
        return heads

    def decide(self, context: Context) -> list[Decision]:
        """One decision a cache site; a place keeps the same heads in every phase."""
        places = context.cache_places("RazorAttention")
        reaches = self._reaches(context, places)
        if self.heads is not None:
            kept = self._given(places)
        else:
            scored = [place for place in places if place not in reaches]
            scores = self._score(context, scored) if scored else []
            kept = choose_heads(scores, self.induction, self.echo)
            lengths = {site.place: site.length for sites in context.sites.values() for site in sites.cache}
            kept |= {place: self._far(reach, lengths[place]) for place, reach in reaches.items()}
            context.measured["razor"] = _record(scores, [reaches[p] for p in places if p in reaches], kept, places)
        return [
            self._decision(site, kept.get(site.place), reaches.get(site.place))
            for sites in context.sites.values()
            for site in sites.cache
        ]

    def window_for(self, length: int) -> int:
        """Recent tokens that a head keeps, of a captured cache of so many."""
        return max(self.window, math.ceil(length / self.ratio))

    def _given(self, places: Sequence[str]) -> dict[str, tuple[int, ...]]:
        assert self.heads is not None
        if len(self.heads) != len(places):
            raise InvalidArgument(
                f"RazorAttention: heads are given of {len(self.heads)} layers, the program has {len(places)}"
            )
        return dict(zip(places, self.heads, strict=True))

    def _reaches(self, context: Context, places: Sequence[str]) -> dict[str, HeadReach]:
        """How far back heads see, of the layers with ALiBi."""
        name, sites = next(iter(context.sites.items()))
        of = [site for site in sites.cache if site.place in places]
        return {reach.place: reach for reach in head_reach(context.phases[name], of, self.eps, self.margin)}

    def _far(self, reach: HeadReach, length: int | None) -> tuple[int, ...]:
        """Heads that see further back than the window."""
        window = 0 if length is None else self.window_for(length)
        return tuple(head for head, tokens in enumerate(reach.reach) if tokens > window)

    def _score(self, context: Context, places: Sequence[str]) -> list[HeadScores]:
        name = next((n for n, s in context.sites.items() if any(c.reads == "new" for c in s.cache)), None)
        if name is None or context.facts.get("max_cache_len") is None:
            raise InvalidArgument(
                "RazorAttention scores heads in a phase that reads many tokens at once, as capture_causal_lm makes one;"
                " give `heads`, the key-value heads of each layer that are to be kept"
            )
        sites = [site for site in context.sites[name].cache if site.place in places]
        length = int(context.facts["max_cache_len"])
        period = min(self.tokens, (length - 1) // self.repeats)
        vocabulary, special = _vocabulary(context.facts)
        draws = [
            repeated_tokens(vocabulary, period, self.repeats, self.seed + draw, special)[None]
            for draw in range(self.draws)
        ]
        phase = {name: context.phases[name]}
        inputs = calibration_inputs(phase, "causal_lm", context.facts, draws, self.draws, longest=length)[name]
        with context.progress.stage("score heads", len(sites) * len(inputs)):
            return score_heads(phase[name], sites, inputs, period, context.progress.step)

    def _decision(self, site: CacheSite, kept: Sequence[int] | None, reach: HeadReach | None) -> Decision:
        decision = Decision(
            site=site.id, method=self.name, pass_name="split_cache_heads", facts=site.describe(), reason=""
        )
        reason = ""
        if kept is None:
            reason = "the layer's cache was not found in every phase"
        elif site.length is None:
            reason = "the cache grows, there is no buffer of a fixed size to split"
        elif len(set(kept)) == site.kv_heads:
            reason = "all heads of the layer are retrieval heads" if reach is None else self._all_far(site, reach)
        window = 0 if site.length is None else self.window_for(site.length)
        slots = slots_for(self.sinks, window, site.dtype)
        if not reason and slots >= site.length:  # pyright: ignore[reportOperatorIssue] (a length, or there is a reason)
            reason = (
                f"sinks, window and mean take {slots} slots, the whole cache {site.length}; for short contexts give a"
                " smaller window and a larger ratio"
            )
        if reason:
            return decision.model_copy(update={"status": "refused", "reason": reason})
        assert kept is not None
        options = {
            "keep": sorted(set(kept)),
            "sinks": self.sinks,
            "window": window,
            "compensate": self.compensate and reach is None,
        }
        facts = decision.facts | {"role": f"{len(options['keep'])}/{site.kv_heads}"} | _bytes(site, options)
        if reach is not None:
            facts["reach"] = ", ".join(f"{tokens:.0f}" for tokens in reach.reach)
        figures = {"heads": site.kv_heads}
        return decision.model_copy(update={"options": options, "facts": facts, "figures": figures})

    def _all_far(self, site: CacheSite, reach: HeadReach) -> str:
        if self.heads is not None:
            return "all heads of the layer are to keep every token"
        if reach.reason:
            return f"how far back the layer's heads see is not known: {reach.reason}"
        return (
            f"all heads of the layer see further back than {self.window_for(site.length or 0)} tokens, the nearest"
            f" {min(reach.reach):.0f}; give a larger window or eps"
        )


SHORT_CONTEXT: dict[str, Any] = {"induction": 0.16, "echo": 0.10, "window": 256, "ratio": 8}
"""Options for contexts of some thousand tokens and a small model, which needs more of its heads, and more by echo, than
the published shares give it; see docs/razor.md."""


def choose_heads(scores: Sequence[HeadScores], induction: float, echo: float) -> dict[str, tuple[int, ...]]:
    """The heads that keep every token, by place: the best of all layers by either score.

    Args:
        scores: Of each layer.
        induction, echo: Shares of all heads; each is rounded to a number of heads.
    """
    kept: dict[str, set[int]] = {layer.place: set() for layer in scores}
    for share, name in ((induction, "induction"), (echo, "echo")):
        ranked = sorted(
            ((value, layer.place, head) for layer in scores for head, value in enumerate(getattr(layer, name))),
            reverse=True,
        )
        for _, place, head in ranked[: round(share * len(ranked))]:
            kept[place].add(head)
    return {place: tuple(sorted(heads)) for place, heads in kept.items()}


def _vocabulary(facts: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Its size, and the tokens that mean something to the model, the one that begins a text first."""
    config = facts.get("config") or {}
    size = config.get("vocab_size")
    if not size:
        raise InvalidArgument("RazorAttention: the captured model's configuration has no vocab_size; give `heads`")
    found: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name)
        ids = value if isinstance(value, list | tuple) else [value]
        found += [int(i) for i in ids if i is not None and 0 <= int(i) < size and int(i) not in found]
    return int(size), found


def _bytes(site: CacheSite, options: Mapping[str, Any]) -> dict[str, str]:
    """Bytes of the site's buffers before and after."""
    batch, heads, length, _ = shape_of(site.key_buffer)
    value: Tensor = site.key_buffer.meta["val"]
    a_token = value.element_size() * (site.head_dim + site.value_head_dim) * batch
    slots = slots_for(options["sinks"], options["window"], value.dtype)
    kept = len(options["keep"])
    after = kept * length + (heads - kept) * slots
    return {"full bytes": str(heads * length * a_token), "split bytes": str(after * a_token)}


def _record(
    scores: Sequence[HeadScores],
    reaches: Sequence[HeadReach],
    kept: Mapping[str, Sequence[int]],
    places: Sequence[str],
) -> dict[str, Any]:
    record: dict[str, Any] = {"kept": [list(kept[place]) for place in places]}
    if scores:
        record |= {name: [list(getattr(layer, name)) for layer in scores] for name in ("induction", "echo")}
    if reaches:
        record["reach"] = [[tokens if math.isfinite(tokens) else None for tokens in layer.reach] for layer in reaches]
        record["slopes"] = [list(layer.slopes) for layer in reaches]
    return record
