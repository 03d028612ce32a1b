"""Where attention mass lies, by relative tile offset: what the search of Compact Attention reads.

The canonical program runs once on each input; at every site of interest the mass is gathered from its query and key
while they are at hand, so that nothing but the small tables stays. Finished runs can be kept on disk, and are not
repeated when the search is started again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import InvalidFile
from ..kernels.tile_mass import tile_mass
from ..kernels.token_order import token_order
from ..passes.dialects import graph_arguments
from ..patterns.attention import AttentionSite
from ..patterns.video import VideoLayout
from ..replace_files import replacing_file
from .profile import data_hash, fingerprint


@dataclass(frozen=True)
class Gathered:
    """What is gathered at one site.

    Attributes:
        site: The attention.
        layout: Its static grid.
        tile: Tokens of a tile.
        stride: Every how many-th query tile is looked at.
    """

    site: AttentionSite
    layout: VideoLayout
    tile: tuple[int, int, int]
    stride: int


@dataclass(frozen=True)
class OffsetMass:
    """Mass by absolute tile offset, float32 [H, Tt, Th, Tw], and what lies in text, float32 [H]; together 1 a head."""

    mass: Tensor
    rest: Tensor


def gather_masses(
    exported: ExportedProgram,
    phase: str,
    wanted: Sequence[Gathered],
    flat: list[Any],
    checkpoint: Path | None,
    on_site: Callable[[], None],
) -> dict[str, OffsetMass]:
    """Run one input through a phase and gather the masses of its sites; a guidance batch counts as one input.

    Args:
        exported: The canonical program of the phase.
        phase: Its name.
        wanted: Its sites.
        flat: The input.
        checkpoint: Folder in which finished runs are kept, or None.
        on_site: Called after each site.

    Returns:
        Site id -> masses.

    Raises:
        InvalidFile: The folder cannot be written.
    """
    path = None if checkpoint is None else checkpoint / f"{_key(exported, phase, wanted, flat)}.safetensors"
    known = _load(path, wanted)
    if known is not None:
        for _ in wanted:
            on_site()
        return known
    runner = _MassRunner(exported, wanted, on_site)
    with torch.no_grad():
        runner.run(*graph_arguments(exported, flat), enable_io_processing=False)
    if path is not None:
        _save(path, runner.found)
    return runner.found


class _MassRunner(torch.fx.Interpreter):
    def __init__(self, exported: ExportedProgram, wanted: Sequence[Gathered], on_site: Callable[[], None]) -> None:
        super().__init__(exported.graph_module)
        self._wanted = {each.site.node: each for each in wanted}
        self._on_site = on_site
        self.found: dict[str, OffsetMass] = {}

    def run_node(self, n: Node) -> Any:
        each = self._wanted.get(n)
        if each is not None:
            query, key = self.env[each.site.query], self.env[each.site.key]
            self.found[each.site.id] = _gather(each, query, key)
            self._on_site()
        return super().run_node(n)


def _gather(each: Gathered, query: Tensor, key: Tensor) -> OffsetMass:
    layout, groups = each.layout, each.site.heads // each.site.kv_heads
    grid = (int(layout.frames), int(layout.height), int(layout.width))
    order = token_order(
        "tile", *grid, first=int(layout.first), text=int(layout.text), shape=each.tile, device=query.device
    )
    mass, rest = tile_mass(
        query,
        key.repeat_interleave(groups, 1) if groups > 1 else key,
        order,
        frames=grid[0],
        height=grid[1],
        width=grid[2],
        tile=list(each.tile),
        stride=each.stride,
        scale=each.site.scale,
    )
    return OffsetMass(mass.mean(0).cpu(), rest.mean(0).cpu())


def _key(exported: ExportedProgram, phase: str, wanted: Sequence[Gathered], flat: list[Any]) -> str:
    """What a run depends on: the program with its weights, the sites, the tiles and the input."""
    found = fingerprint({phase: exported})
    sites = [f"{each.site.place} {each.layout} {each.tile} {each.stride}" for each in wanted]
    return hashlib.sha256("\n".join([found.graph, found.weights, data_hash([flat]), *sites]).encode()).hexdigest()


def _load(path: Path | None, wanted: Sequence[Gathered]) -> dict[str, OffsetMass] | None:
    """A finished run; None where there is none, or what there is cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        stored = load_file(path)
        return {e.site.id: OffsetMass(stored[f"{e.site.place}.mass"], stored[f"{e.site.place}.rest"]) for e in wanted}
    except (SafetensorError, KeyError, OSError):
        return None


def _save(path: Path, found: Mapping[str, OffsetMass]) -> None:
    tensors = {}
    for site, values in found.items():
        place = site.split("/", 1)[1]
        tensors[f"{place}.mass"], tensors[f"{place}.rest"] = values.mass.contiguous(), values.rest.contiguous()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidFile(f"{path.parent}: the search cannot keep what it found: {error.strerror}") from error
    with replacing_file(path) as temporary:
        save_file(tensors, temporary)
