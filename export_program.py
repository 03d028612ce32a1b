"""`Program.export`: a program as files that run without graphwright's Python.

The suffix says what is written: `.onnx`, `.pt2` (AOTInductor) or `.engine` (TensorRT). A target's exporter is imported
when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .errors import InvalidArgument, UnsupportedLowering
from .lowering.registry import Choice, Row, choose_all, summarize
from .lowering.targets import target_of

if TYPE_CHECKING:
    from .program import Program

EXPORTERS = {"onnx": "export_onnx", "aoti": "export_aoti", "tensorrt": "export_tensorrt"}
"""Target -> the module of this folder whose `export(program, path, **options)` writes its files."""


def export(program: Program, path: str | Path, **options: Any) -> list[Path]:
    """Write a program for a target; see `Program.export`."""
    path = Path(path)
    return _exporter(target_of(path))(program, path, **options)


def plan(program: Program, path: str | Path, **options: Any) -> dict[str, list[Choice]]:
    """What each operator of each phase would become in a file of that name; nothing is built.

    Args:
        program: The program.
        path: Only the suffix is looked at.
        options: As for `export`; `ops` decides.

    Raises:
        InvalidArgument: An unknown suffix.
    """
    target = target_of(path)
    ops = str(options.get("ops", "portable")) if target == "onnx" else ""
    return {name: choose_all(phase.exported.graph.nodes, target, ops) for name, phase in program.phases.items()}


@dataclass(frozen=True)
class Lowered:
    """What a dry run says, by phase: for the terminal and as JSON."""

    phases: dict[str, list[Row]]

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Plain lists and dicts."""
        return {name: [asdict(row) for row in rows] for name, rows in self.phases.items()}

    def __rich__(self) -> Table:
        table = Table("phase", "operator", "calls", "becomes", "passed over")
        for name, rows in self.phases.items():
            for row in rows:
                passed = "\n".join(f"{what or 'refused'}: {why}" for what, why in row.passed_over.items())
                table.add_row(name, row.operator, str(row.calls), row.becomes, passed)
            if not rows:
                table.add_row(name, "none of graphwright's", "", "ATen, which the target translates itself", "")
        return table


def describe(plans: dict[str, list[Choice]]) -> Lowered:
    """Plans as they are printed."""
    return Lowered({name: summarize(choices) for name, choices in plans.items()})


def _exporter(target: str) -> Callable[..., list[Path]]:
    module = f"{__package__}.{EXPORTERS[target]}"
    if find_spec(module) is None:
        raise UnsupportedLowering(f"{target}: this version of graphwright writes no such files; export .onnx instead")
    run = importlib.import_module(module).export

    def export(*arguments: Any, **options: Any) -> list[Path]:
        known = run.__kwdefaults__ or {}
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InvalidArgument(f"{target} has no option {unknown[0]!r}; there are {', '.join(known) or 'none'}")
        return run(*arguments, **options)

    return export
