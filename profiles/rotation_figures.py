"""How large the channels of a residual stream are with and without its rotation: what a rotation is for.

A rotated program's norms give norm(h) R. Since R is orthogonal, norm(h) is that times R^T, so one run of the rotated
program shows both. A channel's size is the largest magnitude that any token has in it, over the mean of all channels;
int4 steps are as wide as the largest channel of a token, so flat is good.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..passes.dialects import graph_arguments
from ..patterns.norm import LAYER_NORM, RMS_NORM

_POINTS = 33
_MOST_NORMS = 8
"""Norms of a stream that are looked at: the layers of a model are much alike in this."""


def rotation_figures(exported: ExportedProgram, flat: list[Any], rotation: Tensor) -> dict[str, list[float]]:
    """Run a rotated program once and measure its norms' channels.

    Args:
        exported: The program of a phase, rotated.
        flat: Its inputs.
        rotation: R [width, width] of the stream.

    Returns:
        `channels unrotated` and `channels rotated`: sizes of the channels, the largest first, at evenly spaced ones;
        the mean over norms. Empty where no norm has the stream's width.
    """
    width = rotation.shape[0]
    norms = [node for node in exported.graph.nodes if node.target in (RMS_NORM, LAYER_NORM) and _width(node) == width]
    if not norms:
        return {}
    runner = _NormRunner(exported, set(norms[:: -(-len(norms) // _MOST_NORMS)]), rotation)
    with torch.no_grad():
        runner.run(*graph_arguments(exported, flat), enable_io_processing=False)
    return {
        name: [round(float(value), 4) for value in torch.stack(curves).mean(0)] for name, curves in runner.found.items()
    }


def channel_sizes(rows: Tensor) -> Tensor:
    """Sizes of the channels of rows [T, n], the largest first, at so many evenly spaced ones: float32 [points]."""
    sizes = rows.abs().amax(0).sort(descending=True).values
    places = torch.linspace(0, len(sizes) - 1, min(_POINTS, len(sizes))).round().long()
    return sizes[places] / sizes.mean().clamp_min(torch.finfo(torch.float32).tiny)


class _NormRunner(torch.fx.Interpreter):
    def __init__(self, exported: ExportedProgram, norms: set[Node], rotation: Tensor) -> None:
        super().__init__(exported.graph_module)
        self._norms, self._rotation = norms, rotation
        self.found: dict[str, list[Tensor]] = {"channels unrotated": [], "channels rotated": []}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._norms:
            rows = value.detach().float().flatten(0, -2)
            self.found["channels rotated"].append(channel_sizes(rows))
            unrotated = rows @ self._rotation.to(rows.device, torch.float32).t()
            self.found["channels unrotated"].append(channel_sizes(unrotated))
        return value


def _width(node: Node) -> Any:
    return node.meta["val"].shape[-1]
