"""Find the first pass or site that breaks the numbers of a program, with a logarithmic number of runs.

The program is made again from the model: exact passes one by one, then its decisions, place by place. With so many of
the first steps it holds the tolerance, with so many more it does not; the middle is tried until the two are neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..build import build
from ..capture import Captured, capture
from ..errors import InvalidArgument, VerificationError
from ..passes.canonicalize import CANONICALIZERS
from ..passes.copy_exported import copy_exported
from ..passes.decision import Decision
from ..passes.dialects import run_functional
from ..passes.manager import PassManager
from ..patterns.graph import GraphView
from ..prepare import Prepared, prepare, with_exact
from ..profiles.calibration import calibration_inputs
from ..profiles.profile import fingerprint
from ..program import Program
from ..progress import Progress
from .printable import Printable
from .tables import Table

Outputs = dict[str, list[list[Tensor]]]
"""Phase -> for each input the outputs that a caller sees."""


@dataclass(frozen=True)
class Trial:
    """One measured run: the program with its first `steps` of so many steps."""

    stage: str
    steps: int
    of: int
    error: float
    holds: bool


class Bisection(Printable):
    """What was found.

    Attributes:
        tolerance: The largest relative L2 error that was allowed.
        error: That of the whole program against the model, the largest of its phases.
        culprit: "" where the program holds the tolerance; a pass's name, or the place of the sites.
        kind: "none", "pass", "site" or "file".
        before, after: The error just before and just after the culprit's step.
        alone: Of sites: the error with this place alone rewritten.
        reason: What else is known of it, such as the invariant that a pass broke.
        trials: Every run.
    """

    def __init__(self, tolerance: float, error: float) -> None:
        self.tolerance, self.error = tolerance, error
        self.kind, self.culprit, self.reason = "none", "", ""
        self.before: float | None = None
        self.after: float | None = None
        self.alone: float | None = None
        self.trials: list[Trial] = []

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "trials": [vars(trial) for trial in self.trials]}

    def __rich__(self) -> RenderableType:
        table = Table("stage", "steps", "error", "holds", title=f"relative L2 error, at most {self.tolerance:g}")
        for trial in self.trials:
            table.add_row(
                trial.stage, f"{trial.steps} of {trial.of}", f"{trial.error:.4g}", "yes" if trial.holds else "no"
            )
        return Group(table, self._verdict()) if self.trials else self._verdict()

    def _verdict(self) -> str:
        if self.kind == "none":
            return f"The program holds the tolerance: its error is {self.error:.4g}."
        if self.kind == "file":
            return (
                f"The program's error is {self.error:.4g}, but what its decisions make of the model holds the"
                " tolerance: the program was changed after it was made, or another version of graphwright made it."
            )
        step = f"{self.before:.4g} -> {self.after:.4g}" if self.before is not None else f"{self.after:.4g}"
        text = f"The first {self.kind} that breaks the tolerance is {self.culprit}: {step}."
        if self.reason:
            text += f" {self.reason}."
        if self.alone is not None:
            alone = "breaks it alone" if self.alone > self.tolerance else "holds it alone: what came before adds up"
            text += f" With this place alone the error is {self.alone:.4g}; it {alone}."
        return text


def bisect(
    program: Program,
    against: nn.Module | ExportedProgram | str | Path | Captured | Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float,
    inputs: Any = None,
    trust: bool = False,
    progress: bool = True,
) -> Bisection:
    """Find the first pass or place that takes a program's outputs further from the model's than allowed.

    Args:
        program: The program.
        against: The model that it was made from: what `optimize` takes, or the canonical program, which needs no
            capture and has no passes to search.
        args: Example positional inputs of a module.
        kwargs: Example keyword inputs of a module.
        tolerance: Largest relative L2 error of the outputs, above 0.
        inputs: What to run, as `optimize` takes for calibration; the example inputs by default.
        trust: As in `capture`.
        progress: Show progress on a terminal.

    Returns:
        The culprit and every run; print it.

    Raises:
        InvalidArgument: The tolerance is no positive number, or `against` is not what the program was made from.
    """
    if not tolerance > 0 or tolerance == float("inf"):
        raise InvalidArgument(f"tolerance must be a positive number, got {tolerance}")
    with Progress(progress) as bar, bar.stage("bisect"):
        search = _Search(program, against, args, kwargs, tolerance, inputs, trust, bar)
        return search.run()


class _Search:
    def __init__(
        self,
        program: Program,
        against: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        tolerance: float,
        inputs: Any,
        trust: bool,
        bar: Progress,
    ) -> None:
        self.program, self.tolerance, self.bar = program, tolerance, bar
        self.captured: Captured | None = None
        self.broken = ""
        if isinstance(against, Program):
            self.prepared = _prepared_from(against)
        else:
            self.captured = capture(against, args, kwargs, trust=trust)
            self.prepared = self._prepare(self.captured)
        if self.prepared is not None and list(self.prepared.exported) != list(program.phases):
            raise InvalidArgument(
                f"the program has the phases {', '.join(program.phases)}, the model {', '.join(self.prepared.exported)}"
            )
        graphs = _graphs(program) if self.prepared is None else self.prepared.exported
        flat = calibration_inputs(graphs, program.kind, program.facts, inputs)
        self.inputs = {name: items for name, items in flat.items() if items}
        if not self.inputs:
            raise InvalidArgument("the program carries no example inputs; give `inputs`")
        self.reference = self._reference()
        self.found = Bisection(tolerance, self.error(_graphs(program)))

    def _prepare(self, captured: Captured) -> Prepared | None:
        try:
            prepared = prepare(captured, self.program.profile.steps)
        except VerificationError as error:
            self.broken = str(error)
            return None
        if fingerprint(prepared.exported) != self.program.profile.fingerprint:
            self.program.profile.check(fingerprint(prepared.exported))
        return prepared

    def _reference(self) -> Outputs:
        if self.captured is not None:
            whole = self.captured.exported
            return {name: [_outputs(whole, flat) for flat in items] for name, items in self.inputs.items()}
        assert self.prepared is not None
        graphs = self.prepared.exported
        return {name: [_outputs(graphs[name], flat) for flat in items] for name, items in self.inputs.items()}

    def error(self, graphs: Mapping[str, ExportedProgram]) -> float:
        """The largest relative L2 error of any phase; infinite where a phase does not run."""
        self.bar.step()
        worst = 0.0
        for name, items in self.inputs.items():
            try:
                results = [_outputs(graphs[name], flat) for flat in items]
            except Exception:  # an operator that cannot run is as wrong as a result can be
                return float("inf")
            worst = max(worst, _distance(self.reference[name], results))
        return worst

    def run(self) -> Bisection:
        if self.found.error <= self.tolerance and not self.broken:
            return self.found
        if self.prepared is None or self.error(self.prepared.exported) > self.tolerance:
            return self._passes()
        return self._sites()

    # ---- exact passes

    def _passes(self) -> Bisection:
        """The model's graph after the first so many canonicalizers; what specialises phases after them is one step."""
        if self.captured is None:
            raise InvalidArgument("the canonical program does not compute what it computed when it was made")
        steps, exported = PassManager(CANONICALIZERS).passes, self.captured.exported

        def measure(count: int) -> float:
            graph = copy_exported(exported)
            try:
                for step in steps[:count]:
                    PassManager([step], check_numbers=False).run(graph)
            except VerificationError as error:
                self.found.reason = str(error)
                return float("inf")
            return self.error(dict.fromkeys(self.inputs, graph))

        names = [step.name for step in steps]
        if measure(len(steps)) <= self.tolerance:
            phase = max(self.inputs, key=lambda name: self._phase_error(name))
            self.found.kind, self.found.culprit = "pass", f"specialising the phase {phase}"
            self.found.reason, self.found.after = self.broken, self._phase_error(phase)
            return self.found
        at = self._search("exact passes", len(steps), measure)
        self.found.kind, self.found.culprit = "pass", names[at - 1]
        return self.found

    def _phase_error(self, name: str) -> float:
        if self.prepared is None:
            return float("inf")
        results = [_outputs(self.prepared.exported[name], flat) for flat in self.inputs[name]]
        return _distance(self.reference[name], results)

    # ---- decisions

    def _sites(self) -> Bisection:
        assert self.prepared is not None
        kept = [d for d in self.program.profile.decisions if d.status == "kept"]
        order = {name: number for number, name in enumerate(_graph_order(self.prepared))}
        places = sorted({d.place for d in kept}, key=lambda place: order.get(place, len(order)))
        self.prepared.shared.update(self.program.profile.tensors)

        def measure_places(wanted: Sequence[str]) -> float:
            return self.error(self._built([d for d in kept if d.place in set(wanted)]))

        if not places or measure_places(places) <= self.tolerance:
            self.found.kind = "file"
            return self.found
        at = self._search("places", len(places), lambda count: measure_places(places[:count]))
        self.found.kind, self.found.culprit = "site", places[at - 1]
        self.found.alone = measure_places([places[at - 1]])
        passes = ", ".join(sorted({d.pass_name for d in kept if d.place == places[at - 1]}))
        self.found.reason = f"It is rewritten by {passes}; program.explain has more"
        return self.found

    def _built(self, decisions: list[Decision]) -> Mapping[str, ExportedProgram]:
        assert self.prepared is not None
        chosen = [d.model_copy() for d in decisions]
        profile = self.program.profile.model_copy(update={"decisions": chosen})
        return _graphs(build(with_exact(self.prepared, chosen), profile))

    def _search(self, stage: str, count: int, measure: Callable[[int], float]) -> int:
        """The least number of steps with which the tolerance is broken while one step less holds it."""
        low, high = 0, count
        errors: dict[int, float] = {0: measure(0), count: measure(count)}
        for steps in (0, count):
            self._note(stage, steps, count, errors[steps])
        while high - low > 1:
            middle = (low + high) // 2
            errors[middle] = measure(middle)
            self._note(stage, middle, count, errors[middle])
            low, high = (middle, high) if errors[middle] <= self.tolerance else (low, middle)
        self.found.before, self.found.after = errors[high - 1], errors[high]
        return high

    def _note(self, stage: str, steps: int, of: int, error: float) -> None:
        self.found.trials.append(Trial(stage, steps, of, error, error <= self.tolerance))


def _prepared_from(program: Program) -> Prepared:
    """The canonical phases of a program to which nothing lossy was done."""
    kept = [d for d in program.decisions if d.status == "kept"]
    if kept:
        raise InvalidArgument(
            f"the program to compare with has {len(kept)} rewritten sites itself; give the model, or a program that was"
            " optimized without methods"
        )
    phases = list(program.phases.values())
    captured = Captured(
        phases[0].exported, program.inputs, tuple(p.plan for p in phases), program.kind, dict(program.facts)
    )
    return Prepared(captured, phases, dict(program.sites), [])


def _graphs(program: Program) -> dict[str, ExportedProgram]:
    return {name: phase.exported for name, phase in program.phases.items()}


def _graph_order(prepared: Prepared) -> list[str]:
    """Places in the order in which the first phase that has them runs them."""
    order: list[str] = []
    for name, exported in prepared.exported.items():
        position = {node: number for number, node in enumerate(exported.graph.nodes)}
        sites = [site for site in prepared.sites[name].all if site.node in position]
        order += [site.place for site in sorted(sites, key=lambda site: position[site.node])]
    return list(dict.fromkeys(order))


def _outputs(exported: ExportedProgram, flat: list[Any]) -> list[Tensor]:
    """What a caller sees: the state that the graph writes is left out."""
    return run_functional(exported, flat)[len(GraphView(exported).mutated) :]


def _distance(reference: Sequence[Sequence[Tensor]], results: Sequence[Sequence[Tensor]]) -> float:
    distance = length = 0.0
    for before, after in zip(reference, results, strict=True):
        for a, b in zip(before, after, strict=True):
            if a.shape != b.shape or not bool(torch.isfinite(b.float()).all()):
                return float("inf")
            distance += float(torch.linalg.vector_norm(a.float() - b.float()) ** 2)
            length += float(torch.linalg.vector_norm(a.float()) ** 2)
    return (distance / max(length, 1e-30)) ** 0.5
