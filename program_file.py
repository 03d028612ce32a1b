"""A program as one `.gw` file, and back. Nothing that is loaded may run code: the archive holds data only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from pydantic import ValidationError
from torch import Tensor

from .archive.container import Contents, read_archive, write_archive
from .errors import InvalidArgument, InvalidFile
from .passes.base import discover
from .passes.copy_exported import copy_exported
from .passes.manager import PassRecord
from .passes.undo import check_undo
from .patterns.graph import Refusal
from .phases import Phase, PhasePlan
from .profiles.profile import Profile
from .program import History, Program
from .torch_private import pytree

if TYPE_CHECKING:
    from .lowering.to_onnx.program import OnnxProgram


def save(program: Program, path: str | Path) -> None:
    """Write a program; its state is written as it was at capture, so what is loaded starts afresh.

    Raises:
        InvalidFile: The path cannot be written.
    """
    history = program.history
    document = {
        "inputs": list(program.inputs),
        "kind": program.kind,
        "facts": program.facts,
        "plans": [phase.plan.model_dump(mode="json") for phase in program.phases.values()],
    }
    documents: dict[str, Any] = {
        "program": document,
        "profile": program.profile.model_dump(mode="json"),
        "history": {
            "passes": [_plain(record) for record in history.passes],
            "refusals": history.refusals,
            "before": history.before,
            "measured": history.measured,
        },
        "report": program.report().to_json(),
    }
    tensors: dict[str, Tensor] = {}
    for name, phase in program.phases.items():
        for position, leaf in enumerate(pytree.tree_leaves(phase.exported.example_inputs or ())):
            if isinstance(leaf, Tensor):
                tensors[f"example.{name}.{position}"] = leaf
    tensors |= {f"profile.{name}": tensor for name, tensor in program.profile.tensors.items()}
    initial = program.initial_state()
    phases = {}
    for name, phase in program.phases.items():
        phases[name] = copy_exported(phase.exported)
        phases[name].state_dict.update(
            {key: value for key, value in initial.items() if key in phase.exported.state_dict}
        )
    write_archive(path, Contents(phases, documents, tensors))


@overload
def load(path: str | Path) -> Program: ...


@overload
def load(path: str | Path, *, provider: str, threads: int | None = None) -> OnnxProgram: ...


def load(path: str | Path, *, provider: str = "", threads: int | None = None) -> Any:
    """Read a program that `Program.save` wrote, or open one that `Program.export` wrote as ONNX.

    Args:
        path: A `.gw` or `.onnx` file; for the latter the result is an `OnnxProgram`, which is called in the same way.
        provider: For ONNX, the execution provider that must run it; the CPU's by default.
        threads: For ONNX, threads within an operator; by default torch's.

    Returns:
        The program; its weights are mapped from the file, so the file must stay as it is while the program is used.

    Raises:
        InvalidFile: The file is missing, foreign, truncated, or holds something that a program does not.
        InvalidArgument: The provider is not there, or was given for a `.gw` file.
        MissingExtra: onnxruntime is not installed.
    """
    if Path(path).suffix == ".onnx":
        from .lowering.to_onnx.program import load_onnx

        return load_onnx(path, provider or "CPUExecutionProvider", threads)
    if provider or threads is not None:
        raise InvalidArgument(f"{path}: provider and threads are for .onnx files")
    discover()  # The graphs call graphwright's operators, which importing the passes registers.
    contents = read_archive(path)
    try:
        document, stored = contents.documents["program"], contents.documents["history"]
        plans = [PhasePlan.model_validate(plan) for plan in document["plans"]]
        phases = [Phase(plan, contents.phases[plan.name]) for plan in plans]
        for phase in phases:
            _restore_examples(phase, contents.tensors)
        history = History(
            [_record(values) for values in stored["passes"]], stored["refusals"], stored["before"], stored["measured"]
        )
        profile = Profile.parse(contents.documents["profile"], str(path))
        prefix = "profile."
        named = {name.removeprefix(prefix): t for name, t in contents.tensors.items() if name.startswith(prefix)}
        profile.tensors.update(named)
        inputs, kind, facts = tuple(document["inputs"]), str(document["kind"]), dict(document["facts"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise InvalidFile(f"{path}: not a graphwright program: {type(error).__name__}: {error}") from error
    return Program(phases, inputs, kind, facts, profile, history)


def _restore_examples(phase: Phase, tensors: Mapping[str, Tensor]) -> None:
    """Give a phase its example inputs back, where all of them are tensors: others are not in the file."""
    spec = phase.exported.call_spec.in_spec
    if spec is None:
        return
    names = [f"example.{phase.name}.{position}" for position in range(spec.num_leaves)]
    if names and all(name in tensors for name in names):
        phase.exported.example_inputs = pytree.tree_unflatten([tensors[name] for name in names], spec)


def _plain(record: PassRecord) -> dict[str, Any]:
    """A record as JSON takes it: what a refusal saw may be a symbolic size, which is written as text."""
    refusals = [
        {**vars(refusal), "facts": {k: v if isinstance(v, _JSON) else str(v) for k, v in refusal.facts.items()}}
        for refusal in record.refusals
    ]
    return {**vars(record), "refusals": refusals}


_JSON = (str, int, float, type(None))


def _record(values: dict[str, Any]) -> PassRecord:
    refusals = tuple(Refusal(**refusal) for refusal in values.pop("refusals"))
    undo = check_undo(values.pop("undo", None))
    return PassRecord(**values, refusals=refusals, undo=undo)
