"""What finding sparse masks costs: memory of the table of masses, time of the search, arithmetic of ARM."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import Any

import torch

from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.kernels.band_recall import band_recall, recall_flops
from graphwright.kernels.tile_mass import tile_counts, tile_grid, tile_mass, tile_order
from graphwright.kernels.window_lists import window_lists
from graphwright.profiles.shrink_windows import frame_groups, shrink

TILE = (2, 8, 8)
WAN_80K = (21, 48, 80)
"""Frames, height and width in tokens of Wan 2.1, 81 frames of 768 x 1280."""


def mass_memory(tokens: tuple[int, ...] = (2048, 8192), heads: int = 2) -> dict[int, dict[str, float]]:
    """MiB that a call of tile_mass adds to a process's peak on the CPU, and what one map of one head would take."""
    code = (
        "from graphwright.benchmarks.compact_search import peak_growth; import sys; print(peak_growth(*sys.argv[1:]))"
    )
    measured = {}
    # Freed memory goes back at once: kept for reuse, it would hide what the call takes.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for count in tokens:
        command = [sys.executable, "-c", code, str(count), str(heads)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        measured[count] = {"MiB": round(int(said) / 1024, 1), "map MiB": count * count * 4 / 2**20}
    return measured


def peak_growth(tokens: str, heads: str) -> int:
    """KiB by which one call raises this process's peak; a small call first brings in libraries and thread pools."""
    torch.set_num_threads(1)
    before = 0
    for count in (512, int(tokens)):
        frames = count // 256
        query, key = torch.randn(2, 1, int(heads), count, 64)
        order = tile_order(frames, 16, 16, TILE)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tile_mass(query, key, order, frames=frames, height=16, width=16, tile=TILE, stride=4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def arm_arithmetic(grids: tuple[tuple[int, int, int], ...] = ((33, 48, 80), (8, 16, 16))) -> list[dict[str, Any]]:
    """Operations of ARM's two samples of a frame's size, by head of 128 channels.

    ``of scores`` is relative to the score map of the (T - 1) L tokens that ARM judges, softmax included, which is what
    the paper's 2 / (T - 1)^2 counts; ``of attention`` to all of dense attention over all T L tokens, whose second
    product makes it less than half of that.
    """
    rows = []
    for frames, height, width in grids:
        length, head_dim = height * width, 128
        both = 2 * recall_flops(length, head_dim)
        scores = recall_flops((frames - 1) * length, head_dim)
        tokens = frames * length
        attention = recall_flops(tokens, head_dim, widths=0) + 2 * tokens * tokens * head_dim
        rows.append(
            {
                "grid": (frames, height, width),
                "operations": both,
                "of scores": both / scores,
                "of attention": both / attention,
                "2 / (T - 1)^2": 2 / (frames - 1) ** 2,
            }
        )
    return rows


def search_seconds(heads: int = 24, rounds: int = 2) -> dict[str, float]:
    """Seconds to search one layer's heads on the tiles of an 80K-token video, by family, and to expand its windows."""
    counts = tile_counts(*WAN_80K, TILE)
    grid, groups = tile_grid(*WAN_80K, TILE), frame_groups(len(counts))
    masses = [_mass(counts, head) for head in range(heads)]

    def search(family: Any) -> list[Any]:
        return [shrink(mass, 0.0, counts, groups, family=family) for mass in masses]

    windows = torch.tensor([found.windows for found in search("dual")], dtype=torch.int32)
    group = torch.tensor(groups, dtype=torch.int32)
    with one_thread():
        return interleaved(
            {
                **{family: lambda family=family: search(family) for family in ("dual", "grouped", "cubic")},
                "window_lists": lambda: window_lists(windows, group, tiles=grid),
            },
            rounds,
        )


def recall_seconds(length: int = 3840, heads: int = 4, rounds: int = 3) -> dict[str, float]:
    """Seconds of band_recall against the same map stored whole, on the CPU."""
    query, key = torch.randn(2, 1, heads, length, 64)
    widths = torch.tensor([length // 8, length // 4, length // 2], dtype=torch.int32)
    places = torch.arange(length)
    bands = (places[:, None] - places).abs() <= widths[:, None, None]

    def whole() -> list[torch.Tensor]:
        shares = (query @ key.mT / 8).softmax(-1)
        return [(shares * band).sum((-1, -2)) / length for band in bands]

    with one_thread():
        return interleaved({"band_recall": lambda: band_recall(query, key, widths), "whole maps": whole}, rounds)


def _mass(counts: torch.Tensor, head: int) -> torch.Tensor:
    """A head of its own width and reach in time, with noise, as heads of video models are."""
    generator = torch.Generator().manual_seed(head)
    t, h, w = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) for size in counts.shape], indexing="ij")
    density = torch.exp(-(w**2) / (1 + head % 7) - h**2 / (1 + head % 3) - t / (1 + head % 5))
    if head % 3 == 0:
        density = density + 0.3 * ((h == 0) | (w == 0))
    mass = counts * (density + 1e-3) * (0.5 + torch.rand(counts.shape, dtype=torch.float64, generator=generator))
    return mass / mass.sum()
