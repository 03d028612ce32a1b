"""`Program.export`: a program as files that run without graphwright's Python; the suffix says which.

Also what a dry run prints: what each operator of each phase would become, before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidArgument
from .inspection.printable import Printable
from .inspection.tables import Table
from .lowering.compare_targets import TARGETS, Agreement, Call
from .lowering.compare_targets import compare_targets as lowered_and_compared
from .lowering.registry import Choice, choose_all, summarize
from .lowering.source import Source
from .lowering.targets import Target, target_of

if TYPE_CHECKING:
    from .program import Program


def export(program: Program, path: str | Path, **options: Any) -> list[Path]:
    """Write a program for a target; see `Program.export`."""
    path = Path(path)
    target = target_of(path)
    run = _exporter(target)
    known = run.__kwdefaults__ or {}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InvalidArgument(f"{target} has no option {unknown[0]!r}; there are {', '.join(known) or 'none'}")
    return run(_source(program), path, **options)


def compare_targets(program: Program, calls: Sequence[Call], targets: Sequence[str] = TARGETS) -> list[Agreement]:
    """How far each target is from PyTorch on the same calls, made one after the other from fresh state.

    Args:
        program: The program; its state is reset.
        calls: Positional and keyword inputs.
        targets: "onnx portable", "onnx ort", "onnx function", "aoti".

    Raises:
        InvalidArgument: There is no such target.
    """
    program.reset()
    expected = [program(*args, **kwargs) for args, kwargs in calls]
    return lowered_and_compared(_source(program), calls, expected, targets)


def _source(program: Program) -> Source:
    return Source(program.phases, program.inputs, program.kind, program.facts, program.initial_state())


def dry_run(program: Program, path: str | Path, ops: str = "portable") -> DryRun:
    """What each operator of each phase would become in a file of that name; nothing is built.

    Args:
        program: The program.
        path: Only the suffix is looked at.
        ops: For ONNX, as for `export`.

    Raises:
        InvalidArgument: An unknown suffix, or `ops` that does not exist.
    """
    target = target_of(path)
    return DryRun(target, {name: _plan(phase.exported, target, ops) for name, phase in program.phases.items()})


class DryRun(Printable):
    """What a program would become on a target, by phase: print it, or take `.to_json()`."""

    def __init__(self, target: str, choices: dict[str, list[Choice]]) -> None:
        self.target, self.choices = target, choices

    def to_json(self) -> dict[str, Any]:
        """Target and, for each phase, one row an operator and what it becomes."""
        phases = {name: [asdict(row) for row in summarize(choices)] for name, choices in self.choices.items()}
        return {"target": self.target, "phases": phases}

    def __rich__(self) -> Table:
        table = Table("phase", "operator", "calls", "becomes", "passed over")
        for name, choices in self.choices.items():
            rows = summarize(choices)
            for row in rows:
                passed = "\n".join(f"{what or 'refused'}: {why}" for what, why in row.passed_over.items())
                table.add_row(name, row.operator, str(row.calls), row.becomes, passed or "-")
            if not rows:
                table.add_row(name, "none of graphwright's", "0", "ATen, which the target translates itself", "-")
        return table


def _plan(exported: Any, target: Target, ops: str) -> list[Choice]:
    if target == "onnx":
        from .lowering.to_onnx.lower import plan

        return plan(exported, ops)
    return choose_all(exported.graph.nodes, target)


def _exporter(target: Target) -> Callable[..., list[Path]]:
    if target == "onnx":
        from .lowering.to_onnx.write import export as run
    elif target == "aoti":
        from .lowering.to_aoti.write import export as run
    elif target == "tensorrt_rtx":
        from .lowering.to_tensorrt_rtx.write import export as run
    else:
        from .lowering.to_tensorrt.write import export as run
    return run
