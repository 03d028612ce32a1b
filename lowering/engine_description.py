"""How engines are called, as data: phases, inputs and outputs in order, sizes, and what state starts from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..archive.signature import write_call
from .engine_sizes import Profile
from .source import Source
from .to_onnx.lower import OnnxModel
from .to_onnx.write import constant


def describe_program(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the phases have in common, and the state that is more than one number, which goes to a file of its own."""
    stored = {name: value.contiguous() for name, value in source.initial.items() if constant(value) is None}
    return {
        "version": 1,
        "kind": source.kind,
        "inputs": list(source.inputs),
        "state": {name: None if name in stored else constant(value) for name, value in source.initial.items()},
    }, stored


def describe_phase(source: Source, name: str, made: OnnxModel, sizes: Profile) -> dict[str, Any]:
    """When a phase runs and what its engine takes."""
    return {
        "plan": source.phases[name].plan.model_dump(mode="json"),
        "inputs": made.interface.input_names,
        "leaves": list(made.interface.leaves),
        "outputs": made.interface.output_names,
        "sizes": sizes,
        "call": write_call(source.phases[name].exported),
        "operators": {choice.node.name: choice.lowering.becomes for choice in made.choices if choice.lowering},
    }
