"""KVTuner (Huawei Noah's Ark and CUHK, ICML 2025): the bits of each layer's keys and values, found once, offline.

1. Sensitivity: what quantizing one layer's keys and values to each of nine pairs of 8, 4 and 2 bits does to the model's
   output (`cache_effects.py`), or, as published, to that of its attention (`cache_sensitivity.py`). Keys matter more:
   their error stands in an exponent.
2. In each layer only pairs on the Pareto front of bits and error stay. Layers that are alike share one choice
   (`cache_groups.py`), as published; by its effects each layer has one of its own.
3. NSGA-II looks for the tables with least loss and least mean bits under a limit (`search_bits.py`). Every evaluation
   builds the program with the packed cache and lets it read calibration text through it (`decode_loss.py`).

When it pays: with long contexts or large batches, where the cache is what fills the memory. On a CPU unpacking costs
about what reading less saves, so it saves memory, not time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from ..errors import InvalidArgument
from ..kernels.packed_cache import BITS, FORMS, Packing
from ..passes.decision import Decision
from ..patterns.cache import CacheSite
from ..patterns.nodes import shape_of
from .cache_effects import enough, measure_effects
from .cache_groups import Group, group_layers, predicted_choices
from .cache_sensitivity import Sensitivity, measure_sensitivity
from .decode_loss import READ, Divergence, block_of, decode_loss
from .method import Context, Method
from .search_bits import Sampler, Table, Trial, best_trial, pareto_front, search_bits


class KVTuner(Method):
    """Search the bits of keys and values by layer."""

    name: ClassVar[str] = "kvtuner"
    reference: ClassVar[str] = "KVTuner: Li et al. 2025, arXiv 2502.04420"
    rewrites: ClassVar[str] = "KV cache, 8, 4 or 2 bits by layer"

    bits: float = Field(4.0, ge=2, le=8, description="Most mean bits of keys and values, scales and minima left out.")
    mode: Literal["per_token", "kivi"] = Field(
        "per_token",
        description="What shares a scale: all channels of a token; or as in KIVI, 32 tokens of a key channel and 32"
        " channels of a value, with the last block of tokens in float16.",
    )
    trials: int = Field(100, ge=1, description="Tables that the search evaluates; 100 trials in the authors' script.")
    sensitivity: Literal["effect", "attention"] = Field(
        "effect",
        description="What layers are judged by: what they do to the model's output, or (published) their attention's.",
    )
    groups: int | None = Field(
        None,
        ge=1,
        description="Most groups of layers that get one pair each; 4 to 8 in the paper. None: 8, and by effects one a"
        " layer.",
    )
    objective: Literal["loss", "divergence"] | Callable[[Any], float] = Field(
        "loss",
        exclude=True,
        description="What the search makes least: the loss on the calibration text, the divergence from the program in"
        " full precision, or your own function of a program.",
    )
    table: tuple[tuple[int, int], ...] | None = Field(
        None, description="(key bits, value bits) of each layer, instead of a search; (16, 16) leaves a layer as it is."
    )
    sampler: Sampler = Field("nsga2", description="How tables are drawn; random is for comparison.")
    seed: int = Field(0, ge=0, description="Of the search.")
    study: Path | None = Field(None, exclude=True, description="File from which an interrupted search goes on.")
    picture: Path | None = Field(None, exclude=True, description="Where to draw the trials and their front (PNG).")

    @field_validator("table")
    @classmethod
    def _known_bits(cls, table: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        for layer, pair in enumerate(table or ()):
            if pair != (16, 16) and not set(pair) <= set(BITS):
                raise ValueError(
                    f"layer {layer} has {pair[0]} and {pair[1]} bits; there are 8, 4, 2 and the pair 16, 16"
                )
        return table

    def decide(self, context: Context) -> list[Decision]:
        """One decision a cache site; a place gets the same pair in every phase."""
        places = context.cache_places("KVTuner")
        refused = {
            site.place: "the layer's cache was not found in every phase"
            for sites in context.sites.values()
            for site in sites.cache
            if site.place not in places
        }
        if not places:
            return [self._decision(site, None, refused[site.place]) for s in context.sites.values() for site in s.cache]
        table = self._given(len(places)) if self.table is not None else self._search(context, places)
        pairs = dict(zip(places, table, strict=True))
        return [
            self._decision(site, pairs.get(site.place), refused.get(site.place, ""))
            for sites in context.sites.values()
            for site in sites.cache
        ]

    def _given(self, layers: int) -> Table:
        assert self.table is not None
        if len(self.table) != layers:
            raise InvalidArgument(f"KVTuner: the table is of {len(self.table)} layers, the program has {layers}")
        return self.table

    def _decision(self, site: CacheSite, pair: tuple[int, int] | None, refused: str) -> Decision:
        decision = Decision(
            site=site.id, method=self.name, pass_name="quantize_cache", facts=site.describe(), reason=""
        )
        if pair is None or pair == (16, 16):
            reason = refused or "the table leaves this layer in full precision"
            return decision.model_copy(update={"status": "refused", "reason": reason})
        options = {"key_bits": pair[0], "value_bits": pair[1], "mode": self.mode}
        facts = {**decision.facts, "role": f"K{pair[0]}V{pair[1]}"} | _bytes(site, pair, self.mode)
        return decision.model_copy(update={"options": options, "facts": facts})

    def _search(self, context: Context, places: Sequence[str]) -> Table:
        build = context.build
        if build is None:
            raise InvalidArgument("KVTuner searches by building programs, and this context builds none")
        layers = self._sensitivity(context, places)
        by_effect = self.sensitivity == "effect"
        groups = group_layers(layers, self.groups or (len(layers) if by_effect else _PUBLISHED_GROUPS))
        objective = self._objective(context)
        read = None if callable(self.objective) else READ

        def evaluate(table: Table) -> float:
            pairs = dict(zip(places, table, strict=True))
            sites = [site for found in context.sites.values() for site in found.cache if site.place in pairs]
            program = build([self._decision(site, pairs[site.place], "") for site in sites], read)
            failed = next((d for d in program.decisions if d.status == "failed"), None)
            if failed is not None:
                raise InvalidArgument(f"KVTuner: {failed.site} cannot be quantized: {failed.reason}")
            return objective(program)

        with context.progress.stage("search the cache's bits", self.trials):
            trials = search_bits(
                groups,
                evaluate,
                limit=self.bits,
                trials=self.trials,
                seed=self.seed,
                sampler=self.sampler,
                starts=predicted_choices(groups, layers),
                study=self.study,
                on_step=context.progress.step,
            )
        chosen = best_trial(trials, self.bits)
        context.measured["kvtuner"] = _record(self, layers, groups, trials, chosen)
        if self.picture is not None:
            from .front_picture import draw_front

            draw_front(trials, chosen, self.bits, self.picture)
        return chosen.table

    def _sensitivity(self, context: Context, places: Sequence[str]) -> list[Sensitivity]:
        """Measured where many tokens are computed at once, if there is such a phase."""
        phases = [name for name in context.sites if context.calibration.get(name)]
        if not phases:
            raise InvalidArgument("KVTuner needs calibration inputs")
        ready = [n for n in phases if any(site.reads == "new" for site in context.sites[n].cache)]
        phase = (ready or phases)[0]
        sites = [site for site in context.sites[phase].cache if site.place in places]
        inputs = context.calibration[phase]
        measure = measure_sensitivity if self.sensitivity == "attention" else measure_effects
        if measure is measure_effects:
            inputs = enough(inputs)
        with context.progress.stage("sensitivity of the cache", len(sites) * len(inputs)):
            return measure(context.phases[phase], sites, inputs, self.mode, context.progress.step)

    def _objective(self, context: Context) -> Callable[[Any], float]:
        if callable(self.objective):
            return self.objective
        flats = context.calibration.get("extend") or []
        texts = [flat[0] for flat in flats if isinstance(flat[0], Tensor) and flat[0].dim() == 2]
        if not texts:
            raise InvalidArgument(
                "KVTuner's own objectives need a program of capture_causal_lm and calibration texts; give"
                " `objective`, your function of a program"
            )
        block = block_of(self.mode)
        if self.objective == "loss":
            return lambda program: decode_loss(program, texts, block)
        assert context.build is not None
        return Divergence(context.build([], READ), texts, block)


_PUBLISHED_GROUPS = 8
"""The most that the paper's tables have."""


def _bytes(site: CacheSite, pair: tuple[int, int], mode: str) -> dict[str, str]:
    """Bytes of the site's buffers in float16 and packed, metadata included."""
    if site.length is None:
        return {}
    batch = int(shape_of(site.key_buffer)[0])
    rows = batch * site.kv_heads
    dims = (site.head_dim, site.value_head_dim)
    packed = [Packing(b, f, d).bytes_for(site.length) for b, f, d in zip(pair, FORMS[mode], dims, strict=True)]
    return {"float16 bytes": str(2 * rows * site.length * sum(dims)), "packed bytes": str(rows * sum(packed))}


def _record(
    method: KVTuner, layers: Sequence[Sensitivity], groups: Sequence[Group], trials: Sequence[Trial], chosen: Trial
) -> Mapping[str, Any]:
    """What is kept of a search, as plain data."""
    return {
        "mode": method.mode,
        "limit": method.bits,
        "objective": method.objective if isinstance(method.objective, str) else "the user's",
        "bits": chosen.bits,
        "value": chosen.objective,
        "table": [list(pair) for pair in chosen.table],
        "sensitivity": [
            {f"K{k}V{v}": layer.error((k, v)) for k, v in sorted(layer.output, reverse=True)} for layer in layers
        ],
        "groups": [
            {"layers": list(group.layers), "candidates": [f"K{k}V{v}" for k, v in group.candidates]} for group in groups
        ],
        "trials": [{"bits": trial.bits, "value": trial.objective} for trial in trials],
        "front": [
            {"bits": t.bits, "value": t.objective, "groups": [_label(t.table[g.layers[0]]) for g in groups]}
            for t in pareto_front(trials)
        ],
    }


def _label(pair: tuple[int, int]) -> str:
    return f"K{pair[0]}V{pair[1]}"
