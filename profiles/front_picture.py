"""The trials of a search and their Pareto front as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidFile, MissingExtra
from .search_bits import Trial, pareto_front


def draw_front(trials: Sequence[Trial], chosen: Trial, limit: float, path: Path) -> None:
    """Draw mean bits against the objective as a PNG.

    Args:
        trials: All trials.
        chosen: The one that was taken.
        limit: Most mean bits that were asked for.
        path: Where to write.

    Raises:
        InvalidFile: The path cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib is not installed: pip install 'graphwright[search]'") from error
    front = pareto_front(trials)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="mean bits of keys and values", ylabel="objective")
    axes.plot([t.bits for t in trials], [t.objective for t in trials], ".", color="0.6", label="trials")
    axes.step([t.bits for t in front], [t.objective for t in front], "o-", where="post", label="front")
    axes.plot(chosen.bits, chosen.objective, "*", markersize=14, label="chosen")
    axes.axvline(limit, linestyle="--", color="0.4", label="limit")
    if min(trial.objective for trial in trials) > 0:
        axes.set_yscale("log")
    axes.legend()
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be written: {error.strerror}") from error
