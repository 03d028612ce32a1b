"""A program as ONNX models: one a phase, over one file of weights, their metadata saying how they are called.

name.onnx                      the most general phase: the one whose condition is tried last
name.PHASE.onnx                the others
name.onnx.data                 every weight once, whichever models read it
name.onnx.state.safetensors    what state starts from, where that is more than one number
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ...archive.signature import write_call
from ...replace_files import replacing_files
from ..source import Source
from ..targets import require_packages
from .lower import OnnxModel, check_options, lower_onnx

KEY = "graphwright"
"""The entry of a model's metadata that says how it is called."""


def export(source: Source, path: Path, *, opset: int = 23, ops: str = "portable") -> list[Path]:
    """Write a program as ONNX.

    Args:
        source: The program.
        path: Where the most general phase goes; the others get its name with theirs in it.
        opset: 23 or 24.
        ops: "portable", "ort" or "function"; see `lower.py`.

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
    from .models import write_models

    with replacing_files(path) as folder:
        shared: dict[str, Tensor] = {}
        lowered = {
            name: lower_onnx(phase.exported, opset=opset, ops=ops, shared=shared)
            for name, phase in source.phases.items()
        }
        stored = {name: value.contiguous() for name, value in source.initial.items() if constant(value) is None}
        documents = _documents(source, lowered, source.files(path), stored)
        for name, made in lowered.items():
            made.model.metadata_props[KEY] = json.dumps(documents[name])
        names = source.files(path)
        write_models({names[name]: made.model for name, made in lowered.items()}, folder, weights_file(path).name)
        if stored:
            safetensors.torch.save_file(stored, folder / state_file(path).name)
        return [path.with_name(file.name) for file in sorted(folder.iterdir())]


def weights_file(path: Path) -> Path:
    """Where the weights of all phases lie."""
    return path.with_name(f"{path.name}.data")


def state_file(path: Path) -> Path:
    """Where the first values of state lie that are more than one number."""
    return path.with_name(f"{path.name}.state.safetensors")


def _documents(
    source: Source, lowered: dict[str, OnnxModel], names: dict[str, str], stored: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """What each model says of itself and of its siblings."""
    from .tidy import written_in_place

    phases = [
        {
            "plan": source.phases[name].plan.model_dump(mode="json"),
            "file": names[name],
            "in_place": written_in_place(made.model, made.interface),
        }
        for name, made in lowered.items()
    ]
    facts = {key: source.facts[key] for key in ("batch_size", "max_cache_len") if key in source.facts}
    state = {key: None if key in stored else constant(value) for key, value in source.initial.items()}
    common = {
        "version": 1,
        "kind": source.kind,
        "inputs": list(source.inputs),
        "facts": facts,
        "phases": phases,
        "state": state,
    }
    return {
        name: common
        | {
            "phase": name,
            "leaves": list(made.interface.leaves),
            "call": write_call(source.phases[name].exported),
        }
        for name, made in lowered.items()
    }


def constant(value: Tensor) -> float | int | bool | None:
    """The number that a tensor holds throughout, None where it holds several."""
    if not value.numel():
        return 0
    first = value.flatten()[0]
    return first.item() if bool((value == first).all()) else None
