"""What attentions of a program reuse: the share of score arithmetic that is saved, by head and by channel group.

Read off the operators when the program runs: `snap_tokens` gives its counts, of `token_roots` the tokens are counted
that are not their own roots. Over a whole sampling the figures are kept step by step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..kernels.snap_tokens import saved_share
from ..passes.decision import Decision
from ..passes.dialects import graph_arguments

_SNAP, _ROOTS = "graphwright.snap_tokens.default", "graphwright.token_roots.default"


def reuses(exported: ExportedProgram) -> bool:
    """Whether a program reuses scores anywhere."""
    return any(str(node.target) in (_SNAP, _ROOTS) for node in exported.graph.nodes)


def channel_groups(decisions: Iterable[Decision]) -> dict[str, tuple[list[str], list[int]]]:
    """Site id -> names and sizes of the channel groups that its tokens are snapped by."""
    found = {}
    for decision in decisions:
        options = decision.options.get("snap") or decision.options
        sizes = options.get("groups") if "thetas" in options else None
        if sizes and "groups" in decision.figures:
            found[decision.site] = (list(decision.figures["groups"]), list(sizes))
    return found


def reuse_figures(
    exported: ExportedProgram, flat: Sequence[Any], groups: dict[str, tuple[list[str], list[int]]]
) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """Run a rewritten program once and measure what it reuses.

    Args:
        exported: The program of a phase, rewritten.
        flat: Its inputs.
        groups: Site id -> names and sizes of its channel groups.

    Returns:
        Site id -> `saving` by head, `saving_by_group`, `reused_queries` and `reused_keys`, all means over the batch;
        and everything that the graph returns.
    """
    runner = _ReuseRunner(exported)
    with torch.no_grad():
        outputs = runner.run(*graph_arguments(exported, flat), enable_io_processing=False)
    found = {
        site: _figures(counts[0], counts[1], runner.tokens[site], groups.get(site, (["all"], [counts[0].shape[-1]])))
        for site, counts in runner.counts.items()
        if len(counts) == 2
    }
    return found, list(outputs)


class _ReuseRunner(torch.fx.Interpreter):
    def __init__(self, exported: ExportedProgram) -> None:
        super().__init__(exported.graph_module)
        self.counts: dict[str, list[Tensor]] = defaultdict(list)
        """Site -> reused elements [B, H, D] of the queries, and then of the keys: so they are inserted."""
        self.tokens: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        site = n.meta.get("graphwright", {}).get("site")
        if site is None or str(n.target) not in (_SNAP, _ROOTS):
            return result
        if str(n.target) == _SNAP:
            snapped, reused = result
            self.tokens[site] = snapped.shape[2]
        else:
            own = torch.arange(result.shape[2], dtype=result.dtype, device=result.device)
            channels = self.fetch_args_kwargs_from_env(n)[0][0].shape[3]
            reused = (result != own).sum(2, dtype=torch.int32)[..., None].expand(-1, -1, channels)
            self.tokens[site] = result.shape[2]
        self.counts[site].append(reused)
        return result


def _figures(query: Tensor, key: Tensor, tokens: int, groups: tuple[list[str], list[int]]) -> dict[str, Any]:
    names, sizes = groups
    parts = zip(names, query.split(sizes, -1), key.split(sizes, -1), strict=True)
    by_group: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for name, q, k in parts:
        by_group[name].append((float(saved_share(q, k, tokens).mean()), q.shape[-1]))
    return {
        "saving": [round(float(share), 4) for share in saved_share(query, key, tokens).mean(0)],
        "saving_by_group": {
            name: round(sum(share * size for share, size in found) / sum(size for _, size in found), 4)
            for name, found in by_group.items()
        },
        "reused_queries": round(float(query.double().mean()) / tokens, 4),
        "reused_keys": round(float(key.double().mean()) / tokens, 4),
    }


class ReuseByStep:
    """Keeps the figures of each call of a sampling."""

    def __init__(self) -> None:
        self._calls: dict[float, list[dict[str, dict[str, Any]]]] = defaultdict(list)

    def add(self, timestep: float, found: dict[str, dict[str, Any]]) -> None:
        """Note the figures of one call by site; none where it ran dense."""
        self._calls[timestep].append(found)

    def summary(self) -> dict[str, Any]:
        """Saving over everything, and by step, layer and group; means over heads, calls and, where not named, layers.

        The saving is of the score arithmetic of the attentions that reuse anything in any step.
        """
        layers = sorted({_place(site) for calls in self._calls.values() for found in calls for site in found})
        steps = [_step(timestep, self._calls[timestep], layers) for timestep in sorted(self._calls, reverse=True)]
        calls = [len(self._calls[step["timestep"]]) for step in steps]
        total = sum(step["saving"] * count for step, count in zip(steps, calls, strict=True)) / max(sum(calls), 1)
        return {"saving": round(total, 4), "steps": steps}


def _place(site: str) -> str:
    return site.split("/", 1)[1]


def _step(timestep: float, calls: list[dict[str, dict[str, Any]]], layers: list[str]) -> dict[str, Any]:
    by_layer = dict.fromkeys(layers, 0.0)
    groups: dict[str, float] = defaultdict(float)
    for found in calls:
        for site, figures in found.items():
            by_layer[_place(site)] += sum(figures["saving"]) / len(figures["saving"]) / len(calls)
            for name, share in figures["saving_by_group"].items():
                groups[name] += share / len(calls) / len(layers)
    return {
        "timestep": timestep,
        "saving": round(sum(by_layer.values()) / max(len(layers), 1), 4),
        "groups": {name: round(share, 4) for name, share in groups.items()},
        "layers": {name: round(share, 4) for name, share in by_layer.items()},
    }
