"""How much TimeRipple would save at each threshold, and the threshold that saves what is wanted.

An element is reused where the least of its deviations along the axes is below the threshold, so the number of elements
below each of some thresholds, counted once for each channel on calibration inputs, gives the saving at all of them:

    saving(theta) = 1 - mean_c (1 - Fq_c(theta)) (1 - Fk_c(theta)),      F_c(theta): share of elements that are below
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import InvalidArgument
from ..kernels.snap_tokens import critical_theta
from ..passes.dialects import graph_arguments
from ..patterns.attention import AttentionSite

_THETAS = torch.logspace(-4, 3, 281)
"""Where the counts are kept: 40 a decade, so that a threshold between two is off by 3% at most."""


@dataclass(frozen=True)
class Watched:
    """A site, and what its tokens are snapped by."""

    site: AttentionSite
    options: Mapping[str, Any]
    """Arguments of `critical_theta`."""


@dataclass(frozen=True)
class Counts:
    """Shares of elements that are reused at each of the thresholds, float64 [heads, channels, thresholds]."""

    query: Tensor
    key: Tensor

    def saving(self, theta: float) -> float:
        """Share of the multiplications of the score map that is saved, mean over heads; 0 at threshold 0."""
        if theta <= 0:
            return 0.0
        place = (math.log10(theta) - math.log10(_THETAS[0])) / (7 / (len(_THETAS) - 1))
        low = min(max(int(place), 0), len(_THETAS) - 2)
        part = min(max(place - low, 0.0), 1.0)
        query, key = ((1 - part) * t[..., low] + part * t[..., low + 1] for t in (self.query, self.key))
        key = key.repeat_interleave(len(query) // len(key), 0)
        return float(1 - ((1 - query) * (1 - key)).mean())


def count_reuse(
    exported: ExportedProgram, watched: Sequence[Watched], flat: list[Any], on_site: Callable[[], None]
) -> dict[str, Counts]:
    """Run one input through a phase and count at its sites.

    Args:
        exported: The canonical program of the phase.
        watched: Its sites.
        flat: The input.
        on_site: Called after each site.

    Returns:
        Site id -> counts.
    """
    runner = _CountRunner(exported, watched, on_site)
    with torch.no_grad():
        runner.run(*graph_arguments(exported, flat), enable_io_processing=False)
    return runner.found


def find_theta(saving: Callable[[float], float], wanted: float) -> float:
    """The least threshold that saves what is wanted, to a thousandth of itself.

    Args:
        saving: Share saved at a threshold; it never falls.
        wanted: The share that is wanted.

    Raises:
        InvalidArgument: No threshold saves as much.
    """
    low, high = math.log(float(_THETAS[0])), math.log(float(_THETAS[-1]))
    if saving(math.exp(high)) < wanted:
        raise InvalidArgument(
            f"a saving of {wanted} over the whole sampling cannot be reached: with every cell constant it is"
            f" {saving(math.exp(high)):.3f}; let fewer steps run dense"
        )
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if saving(math.exp(middle)) >= wanted else (middle, high)
    return math.exp(high)


class _CountRunner(torch.fx.Interpreter):
    def __init__(self, exported: ExportedProgram, watched: Sequence[Watched], on_site: Callable[[], None]) -> None:
        super().__init__(exported.graph_module)
        self._watched = {each.site.node: each for each in watched}
        self._on_site = on_site
        self.found: dict[str, Counts] = {}

    def run_node(self, n: Node) -> Any:
        each = self._watched.get(n)
        if each is not None:
            operands = (self.env[each.site.query], self.env[each.site.key])
            self.found[each.site.id] = Counts(*(_shares(x, each.options) for x in operands))
            self._on_site()
        return super().run_node(n)


def _shares(x: Tensor, options: Mapping[str, Any]) -> Tensor:
    critical = critical_theta(x, **options).permute(1, 3, 0, 2).flatten(2).cpu()
    places = torch.searchsorted(
        critical.contiguous().sort(-1).values, _THETAS.expand(*critical.shape[:2], -1).contiguous()
    )
    return places.double() / critical.shape[2]
