"""How much each layer's attention suffers when its keys and values are quantized, one layer at a time.

    e_o(K bits, V bits) = ||o - o'|| / ||o||,     o = softmax(scale q k^T) v,     o' the same over quantized k and v

q, k and v are those of the full-precision model, so an error of one layer does not reach the next: what is measured is
the layer's own sensitivity (KVTuner, Li et al. 2025, arXiv 2502.04420, section 3). It is a property of the model that
hardly depends on the prompt, which is why it can be measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..kernels.packed_cache import BITS, FORMS, round_trip
from ..passes.dialects import graph_arguments
from ..patterns.cache import CacheSite
from ..patterns.nodes import arguments

Pair = tuple[int, int]
"""Bits of keys and of values."""
PAIRS: tuple[Pair, ...] = tuple((keys, values) for keys in BITS for values in BITS)


@dataclass(frozen=True)
class Sensitivity:
    """One layer's errors.

    Attributes:
        place: The cache site without its phase.
        output: For each pair the relative error of the attention's output, one a calibration input.
        weights: For each number of key bits the mean absolute error of the attention's weights, summed over a row.
    """

    place: str
    output: Mapping[Pair, Sequence[float]]
    weights: Mapping[int, Sequence[float]]

    def error(self, pair: Pair) -> float:
        """The output's error, the mean of all calibration inputs."""
        return sum(self.output[pair]) / len(self.output[pair])


def measure_sensitivity(
    exported: ExportedProgram,
    sites: Sequence[CacheSite],
    inputs: Sequence[list[Any]],
    mode: str,
    on_step: Callable[[], None] = lambda: None,
) -> list[Sensitivity]:
    """Measure all pairs in all layers.

    Args:
        exported: A canonical phase that computes many tokens at once.
        sites: Its caches, in order.
        inputs: Flat inputs; each is run once.
        mode: How a cache is packed, see `kernels/packed_cache.py`.
        on_step: Called after each layer of each input.

    Returns:
        One record a site, in their order.
    """
    runner = _Runner(exported, sites, mode, on_step)
    with torch.no_grad():
        for flat in inputs:
            runner.run(*graph_arguments(exported, flat), enable_io_processing=False)
    return [Sensitivity(site.place, runner.errors[site.node], runner.shifts[site.node]) for site in sites]


def output_errors_of_pairs(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float, mode: str
) -> tuple[dict[Pair, float], dict[int, float]]:
    """The errors of one attention.

    Args:
        query: [B, Hq, N, D].
        key, value: [B, H, M, D], H divides Hq.
        hidden: bool, broadcastable to [B, Hq, N, M]: what a query may not see.
        scale: Of the scores.
        mode: How the cache is packed.

    Returns:
        e_o of each pair, and for each number of key bits the error of the weights.
    """
    key_form, value_form = FORMS[mode]
    repeats = query.shape[1] // key.shape[1]
    query = query.float() * scale

    def weights(keys: Tensor) -> Tensor:
        scores = query @ keys.float().repeat_interleave(repeats, 1).mT
        return scores.masked_fill(hidden, float("-inf")).softmax(-1)

    def outputs(of: Tensor, values: Tensor) -> Tensor:
        return of @ values.float().repeat_interleave(repeats, 1)

    exact = weights(key)
    wanted = outputs(exact, value)
    length = torch.linalg.vector_norm(wanted).clamp_min(1e-30)
    packed = {bits: round_trip(value, bits, value_form) for bits in BITS}
    errors: dict[Pair, float] = {}
    shifts: dict[int, float] = {}
    for key_bits in BITS:
        found = weights(round_trip(key, key_bits, key_form))
        shifts[key_bits] = float((found - exact).abs().sum(-1).mean())
        for value_bits, values in packed.items():
            distance = torch.linalg.vector_norm(outputs(found, values) - wanted)
            errors[key_bits, value_bits] = float(distance / length)
    return errors, shifts


class _Runner(torch.fx.Interpreter):
    def __init__(
        self, exported: ExportedProgram, sites: Sequence[CacheSite], mode: str, on_step: Callable[[], None]
    ) -> None:
        super().__init__(exported.graph_module)
        self._mode, self._on_step = mode, on_step
        self._sites = {site.node: site for site in sites}
        self.errors: dict[Node, dict[Pair, list[float]]] = {s.node: {pair: [] for pair in PAIRS} for s in sites}
        self.shifts: dict[Node, dict[int, list[float]]] = {s.node: {bits: [] for bits in BITS} for s in sites}

    def run_node(self, n: Node) -> Any:
        site = self._sites.get(n)
        if site is not None:
            self._measure(site)
        return super().run_node(n)

    def _measure(self, site: CacheSite) -> None:
        args = arguments(site.attention)
        query, key, value = (self.env[args[name]] for name in ("query", "key", "value"))
        shape = (query.shape[-2], key.shape[-2])
        hidden = torch.zeros(shape, dtype=torch.bool, device=query.device)
        if args["is_causal"]:
            hidden = torch.ones_like(hidden).triu(1)
        if args["attn_mask"] is not None:
            mask = self.env[args["attn_mask"]]
            hidden = ~mask if mask.dtype == torch.bool else mask < _VERY_NEGATIVE
        scale = query.shape[-1] ** -0.5 if args["scale"] is None else args["scale"]
        errors, shifts = output_errors_of_pairs(query, key, value, hidden, float(scale), self._mode)
        for pair, error in errors.items():
            self.errors[site.node][pair].append(error)
        for bits, shift in shifts.items():
            self.shifts[site.node][bits].append(shift)
        self._on_step()


_VERY_NEGATIVE = -1e4
"""Masks that are added hold zero, or the least number of their dtype: in float16 -65504."""
