"""A program as ONNX models: one a phase, over one file of weights, their metadata saying how they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from .archive.signature import write_call
from .lowering.onnx import OnnxModel, check_options, lower_onnx
from .lowering.targets import require_packages
from .onnx_program import KEY, state_file

if TYPE_CHECKING:
    from .program import Program


def export(program: Program, path: Path, *, opset: int = 23, ops: str = "portable") -> list[Path]:
    """Write a program as ONNX.

    Args:
        program: The program.
        path: Where the most general phase goes; the others get its name with theirs in it.
        opset: 23 or 24.
        ops: "portable", "ort" or "function"; see `lowering/onnx.py`.

    Returns:
        The files.

    Raises:
        InvalidArgument: An opset or `ops` that does not exist.
        InvalidFile: The path cannot be written.
        MissingExtra: onnx or onnxscript is not installed.
        UnsupportedLowering: An operator or a size that ONNX cannot take, by name.
    """
    check_options(opset, ops)
    require_packages("onnx")
    from .lowering.onnx_file import check_writable, write_models
    from .lowering.onnx_tidy import written_in_place

    check_writable(path)
    shared: dict[str, Tensor] = {}
    lowered: dict[str, OnnxModel] = {}
    for name, phase in program.phases.items():
        lowered[name] = lower_onnx(phase.exported, opset=opset, ops=ops, shared=shared)
    initial = program.initial_state()
    stored = {
        name: value for name, value in initial.items() if value.numel() and bool((value != value.flatten()[0]).any())
    }
    names = _file_names(lowered, path)
    for name, made in lowered.items():
        phases = [
            {
                "plan": program.phases[other].plan.model_dump(mode="json"),
                "file": names[other],
                "in_place": written_in_place(lowered[other].model, lowered[other].interface),
            }
            for other in lowered
        ]
        facts = {key: program.facts[key] for key in ("batch_size", "max_cache_len") if key in program.facts}
        made.model.metadata_props[KEY] = json.dumps(
            {
                "version": 1,
                "kind": program.kind,
                "inputs": list(program.inputs),
                "facts": facts,
                "phase": name,
                "phases": phases,
                "leaves": list(made.interface.leaves),
                "call": write_call(program.phases[name].exported),
                "state": {key: _initial(initial[key], key in stored) for key in made.interface.state},
            }
        )
    files = write_models({name: made.model for name, made in lowered.items()}, path)
    if stored:
        safetensors.torch.save_file({name: value.contiguous() for name, value in stored.items()}, state_file(path))
        files.append(state_file(path))
    return files


def _initial(value: Tensor, stored: bool) -> Any:
    """What state starts from: one number, or null for what lies in the file of first values."""
    if stored or not value.numel():
        return None if stored else 0
    return value.flatten()[0].item()


def _file_names(lowered: dict[str, OnnxModel], path: Path) -> dict[str, str]:
    *others, general = lowered
    return {name: f"{path.stem}.{name}{path.suffix}" for name in others} | {general: path.name}
