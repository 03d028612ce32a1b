"""What a model's output suffers when the keys or the values of one layer are quantized, one layer at a time.

    d(K bits) = KL(p || p'),     p the next-token distribution, p' the same where this layer's keys are quantized
    error(K bits, V bits) = sqrt(d(K bits) + d(V bits))

Divergences of layers add up nearly, so their roots add up in squares, as the errors of `cache_sensitivity.py` do, and
what reads those reads these. The attention's own error, by which KVTuner goes (Li et al. 2025, arXiv 2502.04420), says
nothing of what the layers behind it make of it: on SmolLM2 it is much alike in all layers, where these differ by
factors of twenty.

The layers before the one in question are computed once for all its variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Interpreter, Node

from ..kernels.packed_cache import BITS, FORMS, round_trip
from ..passes.dialects import graph_arguments
from ..patterns.cache import CacheSite
from ..patterns.nodes import arguments
from .cache_sensitivity import PAIRS, Sensitivity

TOKENS = 512
"""Tokens that are enough: a divergence tells small damage apart on little text."""
Effects = dict[int, float]
"""Bits of the keys, or of the values, of one layer -> mean divergence of the output, nats."""


def measure_effects(
    exported: ExportedProgram,
    sites: Sequence[CacheSite],
    inputs: Sequence[list[Any]],
    mode: str,
    on_step: Callable[[], None] = lambda: None,
) -> list[Sensitivity]:
    """Measure keys and values of all layers in 8, 4 and 2 bits.

    Args:
        exported: A canonical phase that computes many tokens at once and returns logits [..., V] first.
        sites: Its caches, in order.
        inputs: Flat inputs, tokens first; as many as give `TOKENS` are used.
        mode: How a cache is packed, see `kernels/packed_cache.py`.
        on_step: Called after each layer of each input.

    Returns:
        One record a site, in their order; `output` holds one error an input, `weights` nothing.
    """
    found: dict[Node, dict[tuple[int, int], list[float]]] = {site.node: {pair: [] for pair in PAIRS} for site in sites}
    with torch.no_grad():
        for flat in enough(inputs):
            runner = _Runner(exported, mode)
            for site, keys, values in runner.walk(graph_arguments(exported, flat), sites):
                for pair in PAIRS:
                    found[site.node][pair].append((keys[pair[0]] + values[pair[1]]) ** 0.5)
                on_step()
    return [Sensitivity(site.place, found[site.node], {}) for site in sites]


def enough(inputs: Sequence[list[Any]]) -> list[list[Any]]:
    """The first inputs that together have `TOKENS` tokens."""
    chosen, tokens = [], 0
    for flat in inputs:
        if tokens >= TOKENS:
            break
        chosen.append(flat)
        tokens += next((value.numel() for value in flat if isinstance(value, Tensor)), 0)
    return chosen


class _Runner(Interpreter):
    """Runs a graph once, and from each attention on as often as there are variants of it."""

    def __init__(self, exported: ExportedProgram, mode: str) -> None:
        super().__init__(exported.graph_module)
        self.forms = FORMS[mode]
        *self.steps, self.returned = exported.graph.nodes
        specs = exported.graph_signature.output_specs
        self.first = next(i for i, spec in enumerate(specs) if spec.kind is OutputKind.USER_OUTPUT)

    def walk(self, given: Sequence[Any], sites: Sequence[CacheSite]) -> Iterator[tuple[CacheSite, Effects, Effects]]:
        """Yields a site, the divergence by bits of its keys, and that by bits of its values, in the graph's order."""
        self.env, self.args_iter = {}, iter(given)
        self._run(self.steps)
        reference = self._logits().float().log_softmax(-1)
        self.env, self.args_iter = {}, iter(given)
        of = {site.attention: site for site in sites}
        for index, node in enumerate(self.steps):
            if node in of:
                live, effects = self.env, []
                for name, form in zip(("key", "value"), self.forms, strict=True):
                    source = arguments(node)[name]
                    effects.append({})
                    for bits in BITS:
                        packed = round_trip(live[source], bits, form).to(live[source].dtype)
                        self.env = live | {source: packed}
                        self.env = live | {node: self.run_node(node)}
                        self._run(self.steps[index + 1 :])
                        effects[-1][bits] = _divergence(reference, self._logits())
                self.env = live
                yield of[node], effects[0], effects[1]
            self._run([node])

    def _run(self, nodes: Sequence[Node]) -> None:
        """Run calls, and forget what none behind them reads."""
        for node in nodes:
            self.env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                self.env.pop(dead, None)

    def _logits(self) -> Tensor:
        values = self.returned.args[0]
        assert isinstance(values, list | tuple)
        chosen = values[self.first]
        assert isinstance(chosen, Node)
        return self.env[chosen]


def _divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence, nats a row, of log-probabilities [..., V] and logits."""
    found = logits.float().log_softmax(-1)
    rows = reference.numel() // reference.shape[-1]
    total = torch.nn.functional.kl_div(found, reference, reduction="sum", log_target=True)
    return max(float(total), 0.0) / max(rows, 1)
