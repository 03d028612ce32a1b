"""Carry out what the registry chose: put bodies and rewrites in the place of graphwright's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import UnsupportedLowering
from ..kernels.contract import OPERATORS
from ..passes.edit import Edit
from .registry import Choice


@dataclass(frozen=True)
class Body:
    """An emitter: a function with the operator's arguments, in operators that the target takes; it is traced.

    It writes to nothing, not even to what it made itself: it is traced when the graph is functional already.
    """

    function: Callable[..., Any]


REFERENCE = Body(lambda: None)
"""Stands for a body that is the operator's own reference, for lowerings that are registered by name alone."""


@dataclass(frozen=True)
class Rewrite:
    """An emitter that reads stored tensors: it puts calls in the place of one call, and stores tensors anew.

    Attributes:
        function: (edit, call) -> what takes the call's place.
        bodies: Bodies of the operators that `function` calls, where they are no operators of the target themselves.
    """

    function: Callable[[Edit, Node], Node]
    bodies: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Keep:
    """An emitter that leaves the call in the graph, for the target's own translation of it."""


def apply(
    exported: ExportedProgram, choices: Iterable[Choice], shared: dict[str, Tensor] | None = None
) -> ExportedProgram:
    """Lower the calls for which there are choices.

    Args:
        exported: The program; it is changed.
        choices: All of them have a lowering (`registry.require`).
        shared: Stored tensors that rewrites made for other phases, by name; what this one makes is added.

    Returns:
        The program with bodies traced into it.

    Raises:
        UnsupportedLowering: Calls of one operator were to become different bodies.
    """
    edit = Edit(exported, shared)
    bodies: dict[Any, Callable[..., Any]] = {}
    rewritten = False
    for choice in choices:
        assert choice.lowering is not None
        emit = choice.lowering.emit
        if isinstance(emit, Rewrite):
            edit.replace(choice.node, emit.function(edit, choice.node))
            bodies |= emit.bodies
            rewritten = True
            continue
        if not isinstance(emit, Body):
            continue
        function = OPERATORS[choice.operator].reference if emit is REFERENCE else emit.function
        if bodies.setdefault(choice.node.target, function) is not function:
            raise UnsupportedLowering(f"graphwright::{choice.operator}: its calls differ in what takes them")
    if rewritten:
        edit.finish()
    _rename_nested(exported)
    return exported.run_decompositions(bodies) if bodies else exported


def _rename_nested(exported: ExportedProgram) -> None:
    """Rename weights that are called like a part of another, `fc.weight.factors`: no module can hold both."""
    stored, signature = exported.state_dict, exported.graph_signature
    for name in list(stored):
        parts = name.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts))]
        outer = next((prefix for prefix in above if prefix in stored), None)
        if outer is None or name in signature.buffers_to_mutate.values():
            continue
        flat = f"{outer}_{name[len(outer) + 1 :].replace('.', '_')}"
        stored[flat] = stored.pop(name)
        for spec in signature.input_specs:
            if spec.target == name:
                spec.target = flat
