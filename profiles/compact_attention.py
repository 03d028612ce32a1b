"""Compact Attention (Zhejiang University and Huawei 2025): static windows for each head, found once, offline.

Tokens stand in 3D tiles. For each layer, head and bucket of steps the search starts from the full map and shrinks, for
each group of distances in time, two rectangles of tiles by one tile at a time, taking the cut that loses least mass for
what it saves, while the recall stays at `recall` and the cut costs at most `cost`. What it reads are masses by relative
tile offset, gathered on calibration inputs (`offset_mass.py`); the search itself is `shrink_windows.py`. The windows of
several prompts are united. When the program runs nothing is predicted, so it costs nothing.

When it pays: as RainFusion, and where prompts differ little in what their heads look at, which the paper found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from ..errors import InvalidArgument
from ..kernels.tile_mass import tile_counts, tile_grid
from .method import Context
from .offset_mass import Gathered, OffsetMass, gather_masses
from .shrink_windows import Windows, classify, frame_groups, measure, shrink, union
from .video import Place, Proposal, VideoMethod


class CompactAttention(VideoMethod):
    """Search windows offline and keep what is inside."""

    name: ClassVar[str] = "compact_attention"
    reference: ClassVar[str] = "Compact Attention: arXiv 2508.12969"
    rewrites: ClassVar[str] = "video self-attention, windows by head"

    dense_steps: float = Field(
        0.3, ge=0, lt=1, description="Share of the steps at the beginning that run dense; 15 of 50 in the paper."
    )
    recall: float = Field(0.9, gt=0, le=1, description="Least share of a head's attention mass inside its windows.")
    cost: float = Field(
        0.011,
        ge=0,
        description="Most mass a cut may lose for the share of the map that it saves; 0.04 for HunyuanVideo.",
    )
    tile: tuple[int, int, int] | None = Field(
        None, description="Tokens of a tile (t, h, w), 64 or 128 in all; by default what pads least and is most cubic."
    )
    bucket: int = Field(5, ge=1, description="Steps that share one configuration.")
    family: Literal["dual", "grouped", "cubic"] = Field(
        "dual", description="Two rectangles a group, one a group, or one in all, as in the paper's ablation."
    )
    recall_scope: Literal["global", "group"] = Field("global", description="What recall and cost are measured on.")
    stride: int = Field(1, ge=1, description="Look at every so many-th query tile.")
    checkpoint: Path | None = Field(
        None, exclude=True, description="Folder that keeps finished runs, from which an interrupted search goes on."
    )

    @field_validator("tile")
    @classmethod
    def _one_block(cls, tile: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if tile is not None and (min(tile) < 1 or prod(tile) not in (64, 128)):
            raise ValueError(f"a tile of {tile} holds {prod(tile)} tokens, it must hold 64 or 128")
        return tile

    def edges(self, first: int, stop: int) -> tuple[int, ...]:
        """A bucket begins every `bucket` steps."""
        return tuple(range(first, stop, self.bucket))

    def propose(self, places: Sequence[Place], context: Context) -> Mapping[str, Proposal | str]:
        """Gather masses, phase by phase and input by input, and search the windows of each head."""
        answers: dict[str, Proposal | str] = {}
        wanted: dict[str, list[Gathered]] = defaultdict(list)
        for place in places:
            gathered = self._gathered(place)
            if isinstance(gathered, str):
                answers[place.site.id] = gathered
            else:
                wanted[place.phase].append(gathered)
        runs = [(phase, flat) for phase in wanted for flat in context.calibration.get(phase, ())]
        if wanted and not runs:
            raise InvalidArgument("CompactAttention searches on calibration inputs, and there are none")
        masses: dict[str, list[OffsetMass]] = defaultdict(list)
        with context.progress.stage("attention mass", sum(len(wanted[phase]) for phase, _ in runs)):
            for phase, flat in runs:
                exported = context.phases[phase]
                found = gather_masses(exported, phase, wanted[phase], flat, self.checkpoint, context.progress.step)
                for site, mass in found.items():
                    masses[site].append(mass)
        with context.progress.stage("search windows", len(masses)):
            for each in (each for group in wanted.values() for each in group):
                answers[each.site.id] = self._search(each, masses[each.site.id])
                context.progress.step()
        return answers

    def _gathered(self, place: Place) -> Gathered | str:
        layout = place.layout
        if not all(isinstance(size, int) for size in (layout.frames, layout.text, place.tokens)):
            return "the search needs a static grid: capture at the size that it is to run at"
        grid = (int(layout.frames), int(layout.height), int(layout.width))
        return Gathered(place.site, layout, self.tile or best_tile(grid, self.block_of(place.tokens)), self.stride)

    def _search(self, each: Gathered, masses: Sequence[OffsetMass]) -> Proposal:
        grid = (int(each.layout.frames), int(each.layout.height), int(each.layout.width))
        counts = tile_counts(*grid, each.tile, each.stride)
        groups = frame_groups(counts.shape[0]) if self.family != "cubic" else [0] * counts.shape[0]
        heads = [
            self._head([(mass.mass[head], float(mass.rest[head])) for mass in masses], counts, groups)
            for head in range(each.site.heads)
        ]
        sparsity = [found.sparsity for found in heads]
        video = prod(grid)
        # Text is dense as rows and columns.
        covered = (video / (video + int(each.layout.text))) ** 2
        return Proposal(
            "keep_windows",
            {
                "grid": list(grid),
                "block_size": prod(each.tile),
                "tile": list(each.tile),
                "groups": list(groups),
                "windows": [[[int(size) for size in group] for group in found.windows] for found in heads],
            },
            1 - covered * sum(sparsity) / len(sparsity),
            {
                "sparsity": [round(value, 4) for value in sparsity],
                "searched_recall": [round(found.recall, 4) for found in heads],
                "shape": [_shape(found, grid, each.tile, groups) for found in heads],
            },
        )

    def _head(self, masses: Sequence[tuple[Tensor, float]], counts: Tensor, groups: Sequence[int]) -> Windows:
        """One head's windows, united over the prompts, and their least recall on any of them."""
        found = [
            shrink(
                mass,
                rest,
                counts,
                groups,
                recall=self.recall,
                cost=self.cost,
                recall_scope=self.recall_scope,
                family=self.family,
            )
            for mass, rest in masses
        ]
        united = found[0].windows
        for other in found[1:]:
            united = union(united, other.windows)
        measured = [measure(united, mass, rest, counts, groups) for mass, rest in masses]
        return min(measured, key=lambda windows: windows.recall)


def _shape(found: Windows, grid: tuple[int, int, int], tile: tuple[int, int, int], groups: Sequence[int]) -> str:
    kind, varies = classify(found.windows, tile_grid(*grid, tile), groups)
    return f"{kind}, varying in time" if varies else kind


def best_tile(grid: tuple[int, int, int], volume: int) -> tuple[int, int, int]:
    """The tile of so many tokens that pads a grid least, and of those the one that is nearest to a cube."""

    def cost(tile: tuple[int, int, int]) -> tuple[float, float]:
        padded = prod(-(-size // part) * part for size, part in zip(grid, tile, strict=True))
        return padded / prod(grid), max(tile) / min(tile)

    return min(_tiles(volume), key=cost)


def _tiles(volume: int) -> Iterator[tuple[int, int, int]]:
    sizes = [size for size in range(1, volume + 1) if volume % size == 0]
    return ((t, h, w) for t, h, w in product(sizes, repeat=3) if t * h * w == volume)
