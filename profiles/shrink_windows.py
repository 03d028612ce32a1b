"""The search of Compact Attention: shrink the windows of one head until a cut costs too much attention.

A head keeps, for each group of distances in time, the tiles at the spatial offsets that one of two rectangles covers:

    |dw| <= W_out and |dh| <= h_in      or      |dw| <= w_in and |dh| <= H_out          w_in <= W_out, h_in <= H_out

All start full. Group after group, each of the four sides is lowered by a tile on trial, and the cheapest trial counts:

    cost   = (mass it loses / all mass) / (tile pairs it saves / all tile pairs)
    recall = mass inside / all mass, afterwards

It is accepted while cost <= `cost` and recall >= `recall`; else that side is left as it is for good. A head is done
when all sides are. A `cost` of 0.011 so means: a strip goes only while it has below 1.1% of the uniform density.
Where one inner side alone uncovers nothing (both rectangles full, at the start), both inner sides go down together and
cut the corners: without that, no cross could begin.

Masks depend on the offset alone, so all sums are over tables of offsets (``kernels/tile_mass.py``), and prefix sums
make each of them four look-ups. Offsets past a table's end are those of the last row; text is always kept, and counts
as mass inside.

Source: Compact Attention (arXiv:2508.12969), its boundary shrinking, with cost 0.011 for Wan 2.1 and 0.04 for
HunyuanVideo at recall 0.9. The paper leaves open what recall and cost are relative to (here the whole head, or the
group), the groups, and the step that begins a cross; these are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument

Window = tuple[int, int, int, int]
"""(W_out, h_in, w_in, H_out) in tiles, the order of the operator ``window_lists``; negative: nothing."""

Family = Literal["dual", "grouped", "cubic"]
"""Two rectangles for each group, one for each group, or one for all: the paper's ablation of its windows."""

_NOTHING: Window = (-1, -1, -1, -1)


@dataclass(frozen=True)
class Windows:
    """A head's windows and what they do: one window a group, share of mass inside, share of tile pairs outside."""

    windows: tuple[Window, ...]
    recall: float
    sparsity: float


def shrink(
    mass: Any,
    rest: float,
    counts: Any,
    groups: Sequence[int],
    *,
    recall: float = 0.9,
    cost: float = 0.011,
    recall_scope: Literal["global", "group"] = "global",
    family: Family = "dual",
) -> Windows:
    """Search the windows of one head.

    Args:
        mass: Attention by absolute offset of tiles ``[Tt, Th, Tw]``, a tensor or an array.
        rest: Attention to tokens in no tile.
        counts: How many pairs of tiles are at each offset, ``[Tt, Th, Tw]``.
        groups: The group of each distance in time; larger distances are in the last one's group.
        recall: Least share of attention to keep.
        cost: Largest cost of a cut.
        recall_scope: What recall and cost are relative to: the head's mass and pairs, or the group's.
        family: What shapes are searched.

    Returns:
        One window for each group, of the head's recall at least ``recall``.

    Raises:
        InvalidArgument: The tables do not fit each other, hold a NaN or no mass, or a limit is out of range.
    """
    if not 0 <= recall <= 1 or not cost >= 0:
        raise InvalidArgument(f"got recall={recall} and cost={cost}, expected 0 <= recall <= 1 and 0 <= cost")
    tables = _Tables.of(mass, rest, counts, [0] * len(groups) if family == "cubic" else groups)
    search = _Search(tables, recall, cost, recall_scope == "group", _two_rectangles if family == "dual" else _one)
    found = search.run()
    if family == "cubic":
        found = found * (max(groups) + 1)
    return measure(found, mass, rest, counts, groups)


def measure(windows: Sequence[Sequence[int]], mass: Any, rest: float, counts: Any, groups: Sequence[int]) -> Windows:
    """Recall and sparsity of given windows on a table of masses, as in :func:`shrink`."""
    tables = _Tables.of(mass, rest, counts, groups)
    if len(windows) != len(tables.mass):
        raise InvalidArgument(f"got {len(windows)} windows, expected {len(tables.mass)}, one a group")
    simple = tuple(_simplified(window) for window in windows)
    covered = [tables.covered(group, window) for group, window in enumerate(simple)]
    kept = tables.recall([inside for inside, _ in covered])
    return Windows(simple, kept, 1 - sum(pairs for _, pairs in covered) / tables.pairs)


def union(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> tuple[Window, ...]:
    """Windows that cover what either covers: for each group the larger of all four sides."""
    if len(a) != len(b):
        raise InvalidArgument(f"got windows of {len(a)} and {len(b)} groups, expected as many")
    pairs = zip(map(_simplified, a), map(_simplified, b), strict=True)
    return tuple((max(p[0], q[0]), max(p[1], q[1]), max(p[2], q[2]), max(p[3], q[3])) for p, q in pairs)


def frame_groups(tiles: int) -> list[int]:
    """The group of each distance in time below ``tiles``: {0}, {1}, {2}, {3}, {4, 5}, {6 and more}, as far as they go.

    Near frames differ most; the paper does not print its groups, and these are ours.
    """
    return [distance if distance < 4 else 4 if distance < 6 else 5 for distance in range(tiles)]


class HeadShape(NamedTuple):
    """What a head's windows look like, and whether that depends on the distance in time."""

    kind: Literal["local", "cross", "global", "empty"]
    varies: bool


def classify(
    windows: Sequence[Sequence[int]], tiles: tuple[int, int, int], groups: Sequence[int] | None = None
) -> HeadShape:
    """Name a head's shape, for reports.

    A head is global if it covers over 85% of a frame (the paper's limit), cross if it covers less than half of the
    box around it (ours), and else local; groups that are dropped do not count. It varies in time if two groups overlap
    by less than 0.8, intersection over union: above that the paper calls masks alike.

    Args:
        windows: One window a group.
        tiles: Grid of tiles (Tt, Th, Tw).
        groups: The group of each distance in time, so that groups count by their pairs of frames; unset, all alike.
    """
    _, height, width = tiles
    weights = [1.0] * len(windows)
    if groups is not None:
        weights = [0.0] * len(windows)
        for distance, at in enumerate(_pairs(tiles[0])):
            weights[groups[min(distance, len(groups) - 1)]] += at
    simple = [_simplified(window) for window in windows]
    areas = [_area(window, height, width) for window in simple]
    boxes = [_area((w[0], w[3], w[0], w[3]), height, width) for w in simple]
    kept = [group for group, area in enumerate(areas) if float(area.sum()) and weights[group]]
    if not kept:
        return HeadShape("empty", False)
    pairs = sum(weights[group] for group in kept)
    frame = sum(_pairs(height)) * sum(_pairs(width))
    covered = sum(weights[group] * float(areas[group].sum()) for group in kept)
    boxed = sum(weights[group] * float(boxes[group].sum()) for group in kept)
    varies = any(
        float(torch.minimum(a, b).sum()) < 0.8 * float(torch.maximum(a, b).sum())
        for (a, weight_a), (b, weight_b) in combinations(zip(areas, weights, strict=True), 2)
        if weight_a and weight_b
    )
    if covered > 0.85 * frame * pairs:
        return HeadShape("global", varies)
    return HeadShape("cross" if covered < 0.5 * boxed else "local", varies)


@dataclass(frozen=True)
class _Tables:
    """Prefix sums ``[group][h + 1][w + 1]`` of mass and of tile pairs, and their totals."""

    mass: list[list[list[float]]]
    counts: list[list[list[float]]]
    rest: float
    full: Window

    @classmethod
    def of(cls, mass: Any, rest: float, counts: Any, groups: Sequence[int]) -> _Tables:
        mass, counts = (torch.as_tensor(t, dtype=torch.float64, device="cpu").detach() for t in (mass, counts))
        if mass.ndim != 3 or mass.shape != counts.shape:
            raise InvalidArgument(f"got tables {list(mass.shape)} and {list(counts.shape)}, expected one [Tt, Th, Tw]")
        if not groups or min(groups) < 0:
            raise InvalidArgument(f"got groups {list(groups)}, expected a group of 0 or more for each distance")
        total = float(mass.sum()) + rest
        if not (0 < total < float("inf")) or float(mass.min()) < 0 or rest < 0:
            raise InvalidArgument(f"got a mass of {total} in all, expected finite shares that are not negative")
        of = torch.tensor([groups[min(distance, len(groups) - 1)] for distance in range(len(mass))])
        height, width = mass.shape[1:]
        full = (width - 1, height - 1, width - 1, height - 1)
        count = max(groups) + 1
        return cls(_prefix_sums(mass, of, count), _prefix_sums(counts, of, count), float(rest), full)

    @property
    def pairs(self) -> float:
        return sum(table[-1][-1] for table in self.counts)

    def covered(self, group: int, window: Window) -> tuple[float, float]:
        """Mass and tile pairs of a group inside the window."""
        sides = [max(-1, min(side, most)) + 1 for side, most in zip(window, self.full, strict=True)]
        outer_w, inner_h, inner_w, outer_h = sides
        both_w, both_h = min(outer_w, inner_w), min(inner_h, outer_h)
        mass, counts = self.mass[group], self.counts[group]
        return (
            mass[inner_h][outer_w] + mass[outer_h][inner_w] - mass[both_h][both_w],
            counts[inner_h][outer_w] + counts[outer_h][inner_w] - counts[both_h][both_w],
        )

    def recall(self, kept: Sequence[float]) -> float:
        """Share of the mass that is inside, for the mass that each group keeps."""
        return (sum(kept) + self.rest) / (sum(table[-1][-1] for table in self.mass) + self.rest)


def _prefix_sums(table: Tensor, of: Tensor, groups: int) -> list[list[list[float]]]:
    sums = table.new_zeros((groups, table.shape[1] + 1, table.shape[2] + 1))
    sums[:, 1:, 1:].index_add_(0, of, table)
    return sums.cumsum(1).cumsum(2).tolist()


Trials = Iterator[tuple[int, Window, Window | None]]
"""For each side its number, the window with it lowered, and the window to try if that uncovers nothing."""


def _two_rectangles(window: Window) -> Trials:
    outer_w, inner_h, inner_w, outer_h = window
    corners = (outer_w, inner_h - 1, inner_w - 1, outer_h)
    yield 0, (outer_w - 1, inner_h, min(inner_w, outer_w - 1), outer_h), None
    yield 1, (outer_w, min(inner_h, outer_h - 1), inner_w, outer_h - 1), None
    yield 2, (outer_w, inner_h, inner_w - 1, outer_h), corners
    yield 3, (outer_w, inner_h - 1, inner_w, outer_h), corners


def _one(window: Window) -> Trials:
    width, height = window[:2]
    yield 0, (width - 1, height, width - 1, height), None
    yield 1, (width, height - 1, width, height - 1), None


_TIE = 1e-9
"""Costs this near are equal, and the side named first goes: sums of shares differ by 1e-16, times tile pairs in all.

Two sides may uncover the very same tiles; by chance of rounding, a rectangle would be spent where an edge does.
"""


class _Search:
    """Windows, what they keep, and which sides are still lowered, for each group."""

    def __init__(self, tables: _Tables, recall: float, cost: float, by_group: bool, trials: Any) -> None:
        self.tables, self.least, self.most, self.trials = tables, recall, cost, trials
        groups = range(len(tables.mass))
        self.windows = [tables.full for _ in groups]
        self.kept = [tables.covered(group, tables.full) for group in groups]
        masses, pairs = zip(*self.kept, strict=True)
        self.by_group = by_group
        self.whole_mass = masses if by_group else [sum(masses) + tables.rest for _ in groups]
        self.whole_pairs = pairs if by_group else [sum(pairs) for _ in groups]
        self.live = [{side for side, _, _ in trials(tables.full)} for _ in groups]

    def run(self) -> tuple[Window, ...]:
        while any(self.live):
            for group, live in enumerate(self.live):
                if live:
                    self._step(group, live)
        return tuple(self.windows)

    def _step(self, group: int, live: set[int]) -> None:
        """Take the cheapest trial of a group, or give up its side; a group without a trial is done."""
        best: tuple[float, int, Window, tuple[float, float]] | None = None
        for side, lowered, instead in self.trials(self.windows[group]):
            if side not in live:
                continue
            window, kept = self._uncovers(group, lowered, instead)
            if window is None:
                continue
            cost = self._cost(group, kept)
            if best is None or cost < best[0] - _TIE:
                best = cost, side, window, kept
        if best is None:
            live.clear()
            return
        cost, side, window, kept = best
        if cost <= self.most and self._recall(group, kept[0]) >= self.least:
            self.windows[group], self.kept[group] = window, kept
        else:
            live.discard(side)

    def _uncovers(
        self, group: int, lowered: Window, instead: Window | None
    ) -> tuple[Window | None, tuple[float, float]]:
        """The first of the two windows that holds fewer pairs than now, and what it keeps."""
        for window in (lowered, instead):
            if window is not None and min(window) >= -1:
                kept = self.tables.covered(group, window)
                if kept[1] < self.kept[group][1]:
                    return window, kept
        return None, (0.0, 0.0)

    def _cost(self, group: int, kept: tuple[float, float]) -> float:
        mass, pairs = (now - then for now, then in zip(self.kept[group], kept, strict=True))
        return mass * self.whole_pairs[group] / (pairs * self.whole_mass[group]) if mass > 0 else 0.0

    def _recall(self, group: int, mass: float) -> float:
        if self.by_group:
            return mass / self.whole_mass[group] if self.whole_mass[group] else 1.0
        return self.tables.recall([mass if each == group else now for each, (now, _) in enumerate(self.kept)])


def _simplified(window: Sequence[int]) -> Window:
    """The same cover with no side that means nothing: an empty rectangle becomes the other one."""
    outer_w, inner_h, inner_w, outer_h = (int(side) for side in window)
    if min(outer_w, inner_h) < 0:
        outer_w, inner_h = inner_w, outer_h
    if min(inner_w, outer_h) < 0:
        inner_w, outer_h = outer_w, inner_h
    return _NOTHING if min(outer_w, inner_h) < 0 else (outer_w, inner_h, inner_w, outer_h)


def _pairs(size: int) -> list[int]:
    """Along an axis of so many tiles, how many pairs are at each distance."""
    return [(size - distance) * (2 if distance else 1) for distance in range(size)]


def _area(window: Window, height: int, width: int) -> Tensor:
    """How many pairs of tiles of a frame a window covers at each offset, float64 ``[Th, Tw]``."""
    outer_w, inner_h, inner_w, outer_h = window
    dh, dw = torch.arange(height)[:, None], torch.arange(width)
    inside = ((dw <= outer_w) & (dh <= inner_h)) | ((dw <= inner_w) & (dh <= outer_h))
    return inside * torch.outer(torch.tensor(_pairs(height)), torch.tensor(_pairs(width))).double()
