"""What a variant costs and gains, measured on the program itself.

`measure_sites` runs the canonical program once with every variant computed beside its original (shadow mode): the
error at each site's own output, on equal inputs, and the time of both. `output_errors` rewrites one site at a time and
looks at the program's output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from ..passes.copy_exported import copy_exported
from ..passes.decision import Decision
from ..passes.dialects import graph_arguments, run_functional, stored_value
from ..passes.rewrite import apply_decisions
from ..patterns.graph import GraphView
from ..patterns.nodes import describe


@dataclass(frozen=True)
class SiteMeasure:
    """One site's variant against its original, on the same input.

    Attributes:
        error: Relative L2 distance of the outputs.
        before, after: Seconds, the least of all runs and of all sites with the same shapes.
    """

    error: float
    before: float
    after: float

    @property
    def gain(self) -> float:
        """Time before over time after."""
        return self.before / self.after if self.after > 0 else float("inf")


def measure_sites(
    exported: ExportedProgram,
    phase: str,
    decisions: Sequence[Decision],
    inputs: Sequence[list[Any]],
    shared: dict[str, Tensor],
    least: dict[Hashable, float],
    repeats: int = 3,
) -> tuple[dict[str, SiteMeasure], dict[str, str]]:
    """Measure every proposed variant of a phase in its place.

    Args:
        exported: The canonical program; not changed.
        phase: Its name.
        decisions: The proposals.
        inputs: Flat inputs to run on.
        shared: Tensors that several phases share; the variants' weights are left there.
        least: Least seconds by workload so far; phases that do the same work share them. Updated.
        repeats: Runs on each input; times are minima over all runs.

    Returns:
        Site id -> measure; site id -> why its variant could not be made or run.
    """
    copy = copy_exported(exported)
    rewriting = apply_decisions(copy, phase, decisions, shared, shadow=True)
    copy.graph_module.recompile()
    owner: dict[Node, tuple[str, str]] = {}
    pairs: dict[Node, list[tuple[Node, Node, str]]] = {}
    for site, replaced in rewriting.pairs.items():
        for node in rewriting.changes[site].added:
            owner[node] = (site, "after")
        for old, new in replaced:
            owner.setdefault(old, (site, "before"))
            for node in (old, new):
                pairs.setdefault(node, []).append((old, new, site))
    runner = _ShadowRunner(copy, owner, pairs)
    for flat in inputs:
        for _ in range(repeats):
            runner.run_once(flat)
    workloads = {site: _workload(replaced) for site, replaced in rewriting.pairs.items()}
    for (site, side), seconds in runner.best.items():
        key = (workloads[site], side)
        least[key] = min(seconds, least.get(key, float("inf")))
    measured = {
        site: SiteMeasure(
            (runner.distance[site] / max(runner.length[site], 1e-30)) ** 0.5,
            least.get((workloads[site], "before"), 0.0),
            least.get((workloads[site], "after"), 0.0),
        )
        for site in runner.distance
    }
    return measured, rewriting.failed


def _workload(replaced: Sequence[tuple[Node, Node]]) -> Hashable:
    """What decides a site's time: operators, shapes and dtypes. Sites of one workload share their least times."""
    return tuple(
        (str(node.target), tuple(describe(argument).partition(":")[2] for argument in node.all_input_nodes))
        for pair in replaced
        for node in pair
    )


def output_errors(
    exported: ExportedProgram,
    phase: str,
    decisions: Sequence[Decision],
    inputs: Sequence[list[Any]],
    shared: dict[str, Tensor],
    on_step: Callable[[], None] | None = None,
) -> dict[str, float]:
    """The relative L2 error of the program's output with one site rewritten at a time.

    Args:
        exported: The canonical program; not changed.
        phase: Its name.
        decisions: The sites to try.
        inputs: Flat inputs.
        shared: Tensors that several phases share.
        on_step: Called after each site.

    Returns:
        Site id -> error, for the sites that could be rewritten.
    """
    errors: dict[str, float] = {}
    copy = copy_exported(exported)
    runs = [_Rerun(copy, flat) for flat in inputs]
    for decision in decisions:
        rewriting = apply_decisions(copy, phase, [decision], shared)
        if decision.site in rewriting.changes:
            results = [run.outputs() for run in runs]
            errors[decision.site] = relative_error(exported, [run.reference for run in runs], results)
            rewriting.rollback(decision.site)
        if on_step is not None:
            on_step()
    return errors


def channel_maxima(
    exported: ExportedProgram, nodes: Collection[Node], inputs: Sequence[list[Any]]
) -> dict[Node, Tensor]:
    """The largest absolute value of each last-dimension channel, over all tokens of all inputs.

    Args:
        exported: The canonical program.
        nodes: The activations of interest, [..., K].
        inputs: Flat inputs.

    Returns:
        Node -> float32 [K].
    """
    runner = _ChannelRunner(exported, nodes)
    for flat in inputs:
        with torch.no_grad():
            runner.run(*graph_arguments(exported, flat), enable_io_processing=False)
    return runner.maxima


class _ChannelRunner(torch.fx.Interpreter):
    def __init__(self, exported: ExportedProgram, nodes: Collection[Node]) -> None:
        super().__init__(exported.graph_module)
        self._nodes = set(nodes)
        self.maxima: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            largest = value.detach().float().abs().reshape(-1, value.shape[-1]).amax(0)
            known = self.maxima.get(n)
            self.maxima[n] = largest if known is None else torch.maximum(known, largest)
        return value


def relative_error(
    exported: ExportedProgram, reference: Iterable[Sequence[Tensor]], results: Iterable[Sequence[Tensor]]
) -> float:
    """Relative L2 distance over the user outputs of all runs; state that the program writes does not count.

    State comes first among a program's outputs, and a rewritten program may keep more or less of it.
    """
    mutations = len(GraphView(exported).mutated)
    distance = length = 0.0
    for before, after in zip(reference, results, strict=True):
        count = len(before) - mutations
        for a, b in zip(before[mutations:], after[len(after) - count :], strict=True):
            distance += float(torch.linalg.vector_norm(a.float() - b.float()) ** 2)
            length += float(torch.linalg.vector_norm(a.float()) ** 2)
    return (distance / max(length, 1e-30)) ** 0.5


class _Rerun:
    """Runs a graph again after an edit, only from the edit on: all values of the first run are kept, if they fit.

    Attributes:
        reference: Outputs of the graph as it was at first.
    """

    def __init__(self, exported: ExportedProgram, flat: list[Any]) -> None:
        self._exported = exported
        self._flat = flat
        self._values: dict[Node, Any] | None = None
        kept = _KeepingRunner(exported)
        self.reference = kept.run_once(flat)
        if kept.bytes <= KEPT_BYTES:
            self._values = kept.env

    def outputs(self) -> list[Tensor]:
        """Outputs of the graph as it is now."""
        if self._values is None:
            return run_functional(self._exported, self._flat)
        changed: dict[Node, Any] = {}

        def value_of(node: Node) -> Any:
            return changed[node] if node in changed else self._values[node]  # pyright: ignore[reportOptionalSubscript]

        with torch.no_grad():
            for node in self._exported.graph.nodes:
                known = node in self._values and not any(argument in changed for argument in node.all_input_nodes)
                if known or node.op == "output":
                    continue
                if node.op == "placeholder":
                    target = GraphView(self._exported).target(node)
                    changed[node] = stored_value(self._exported, str(target))
                    continue
                mapped: Any = map_arg((node.args, node.kwargs), value_of)
                changed[node] = node.target(*mapped[0], **mapped[1])
        returned = self._exported.graph.output_node().args[0]
        assert isinstance(returned, list | tuple)
        values = [value_of(node) for node in returned if isinstance(node, Node)]
        return [value for value in values if isinstance(value, Tensor)]


KEPT_BYTES = 2 << 30
"""Values of a run that are kept to rerun parts of it; beyond this every rerun is a whole one."""


class _KeepingRunner(torch.fx.Interpreter):
    """Runs a graph once and keeps every value."""

    def __init__(self, exported: ExportedProgram) -> None:
        super().__init__(exported.graph_module, garbage_collect_values=False)
        self._exported = exported
        self.bytes = 0

    def run_once(self, flat: list[Any]) -> list[Tensor]:
        with torch.no_grad():
            outputs = self.run(*graph_arguments(self._exported, flat), enable_io_processing=False)
        return [value for value in outputs if isinstance(value, Tensor)]

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            self.bytes += value.numel() * value.element_size()
            self.garbage_collect_values = self.bytes > KEPT_BYTES
        return value


class _ShadowRunner(torch.fx.Interpreter):
    """Times the nodes of interest and compares each variant with its original while both are at hand."""

    def __init__(
        self,
        exported: ExportedProgram,
        owner: dict[Node, tuple[str, str]],
        pairs: dict[Node, list[tuple[Node, Node, str]]],
    ) -> None:
        super().__init__(exported.graph_module)
        self._exported = exported
        self._owner = owner
        self._pairs = pairs
        self._values: dict[Node, Tensor] = {}
        self._spent: dict[tuple[str, str], float] = {}
        self.best: dict[tuple[str, str], float] = {}
        self.distance: dict[str, float] = {}
        self.length: dict[str, float] = {}

    def run_once(self, flat: list[Any]) -> None:
        self._spent, self._values = {}, {}
        with torch.no_grad():
            self.run(*graph_arguments(self._exported, flat), enable_io_processing=False)
        for key, seconds in self._spent.items():
            self.best[key] = min(seconds, self.best.get(key, float("inf")))

    def run_node(self, n: Node) -> Any:
        key = self._owner.get(n)
        if key is None:
            return super().run_node(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = super().run_node(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._spent[key] = self._spent.get(key, 0.0) + time.perf_counter() - started
        for old, new, site in self._pairs.get(n, ()):
            self._values[n] = result
            if old in self._values and new in self._values:
                self._compare(self._values.pop(old), self._values.pop(new), site)
        return result

    def _compare(self, original: Tensor, variant: Tensor, site: str) -> None:
        reference = original.float()
        difference = torch.linalg.vector_norm(reference - variant.float())
        self.distance[site] = self.distance.get(site, 0.0) + float(difference) ** 2
        self.length[site] = self.length.get(site, 0.0) + float(torch.linalg.vector_norm(reference)) ** 2
