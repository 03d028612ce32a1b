"""Which precision pairs are worth trying in which layers: Pareto pruning in a layer, clustering between layers.

1. In each layer only those of the nine pairs stay that no other pair beats in bits and error.
2. Layers are divided by the set that stayed, and within a set clustered by their errors; a cluster gets one pair.

So the search has one choice a group instead of one a layer: about 5^6 instead of 9^32 tables.

Source: KVTuner (Li et al. 2025, arXiv 2502.04420), section 5.2 and 5.3. How DBSCAN is set there is not said; here its
features are log10 of the errors, less their mean and over their deviation, a lone layer is a group of its own
(`min_samples=1`), and the radius is the least that leaves at most so many groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import MissingExtra
from .cache_sensitivity import PAIRS, Pair, Sensitivity


@dataclass(frozen=True)
class Group:
    """Layers that get one pair.

    Attributes:
        layers: Their numbers, ascending.
        candidates: The pairs to choose from, by falling bits.
    """

    layers: tuple[int, ...]
    candidates: tuple[Pair, ...]


def mean_bits(pair: Pair) -> float:
    """The equivalent precision of a pair, metadata left out."""
    return sum(pair) / 2


def pareto_pairs(layer: Sensitivity) -> tuple[Pair, ...]:
    """The pairs that no other one beats: at most as many bits and less error, or as little with fewer bits."""

    def beaten(pair: Pair) -> bool:
        mine = (mean_bits(pair), layer.error(pair))
        others = ((mean_bits(other), layer.error(other)) for other in PAIRS if other != pair)
        return any(bits <= mine[0] and error <= mine[1] and (bits, error) != mine for bits, error in others)

    return tuple(sorted((pair for pair in PAIRS if not beaten(pair)), key=lambda pair: (-mean_bits(pair), -pair[0])))


def group_layers(layers: Sequence[Sensitivity], most: int) -> list[Group]:
    """Cluster layers that keep the same pairs.

    Args:
        layers: In order.
        most: Groups in all, if the sets of pairs that stayed are not more.

    Returns:
        The groups, by their first layer.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    sets: dict[tuple[Pair, ...], list[int]] = {}
    for number, layer in enumerate(layers):
        sets.setdefault(pareto_pairs(layer), []).append(number)
    features = {kept: _features([layers[number] for number in numbers], kept) for kept, numbers in sets.items()}
    labels: dict[tuple[Pair, ...], list[int]] = {}
    for radius in _radii(list(features.values())):
        labels = {kept: _cluster(points, radius) for kept, points in features.items()}
        if sum(len(set(found)) for found in labels.values()) <= most:
            break
    groups = [
        Group(tuple(n for n, found in zip(sets[kept], labels[kept], strict=True) if found == label), kept)
        for kept in sets
        for label in sorted(set(labels[kept]))
    ]
    return sorted(groups, key=lambda group: group.layers)


def predicted_choices(groups: Sequence[Group], layers: Sequence[Sensitivity]) -> list[tuple[int, ...]]:
    """Tables that the layers' own errors say are good: a place among the candidates for each group.

    Errors of layers add up in squares, so for each price of a bit the table is the one with the least sum of squares
    and price; the prices are all those at which it changes. These are where the search starts, beside uniform tables.
    """
    squares = [
        [sum(layers[number].error(pair) ** 2 for number in group.layers) for pair in group.candidates]
        for group in groups
    ]
    bits = [[mean_bits(pair) * len(group.layers) for pair in group.candidates] for group in groups]
    prices = {
        (cost[j] - cost[i]) / (size[i] - size[j])
        for cost, size in zip(squares, bits, strict=True)
        for i in range(len(cost))
        for j in range(i + 1, len(cost))
        if size[i] > size[j]
    }
    edges = sorted(prices) or [0.0]
    found = {
        tuple(
            min(range(len(cost)), key=lambda i, c=cost, b=size: c[i] + price * b[i])
            for cost, size in zip(squares, bits, strict=True)
        )
        for price in (edges[0] / 2, *((a + b) / 2 for a, b in pairwise(edges)), edges[-1] * 2)
    }
    return sorted(found, key=lambda table: sum(size[i] for size, i in zip(bits, table, strict=True)))


def _features(layers: Sequence[Sensitivity], pairs: Sequence[Pair]) -> np.ndarray:
    errors = np.array([[max(layer.error(pair), 1e-12) for pair in pairs] for layer in layers])
    points = np.log10(errors)
    return (points - points.mean(0)) / np.maximum(points.std(0), 1e-9)


def _radii(clouds: Sequence[np.ndarray]) -> list[float]:
    """Every radius at which two points of a cloud may join, ascending; the last one joins all."""
    distances = {0.0}
    for points in clouds:
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
        distances.update(float(gap) for gap in gaps.flatten())
    return sorted(distances)


def _cluster(points: np.ndarray, radius: float) -> list[int]:
    try:
        from sklearn.cluster import DBSCAN
    except ImportError as error:
        raise MissingExtra("scikit-learn is not installed: pip install 'graphwright[search]'") from error
    # DBSCAN wants a positive radius; points at one place are neighbours at any.
    found = DBSCAN(eps=radius * (1 + 1e-9) + 1e-12, min_samples=1).fit_predict(points)
    return [int(label) for label in found]
