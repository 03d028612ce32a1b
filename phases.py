"""Phases: one captured graph specialised for conditions that the host knows when the program is called.

A `PhasePlan` says what is assumed (sizes, an empty cache) and when that is so; passes specialise the graph accordingly.
A `Condition` is data, so that a saved program dispatches without running code from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from .errors import InvalidArgument
from .patterns.steps import StepRange


class Condition(BaseModel):
    """A bound on a size or on a value of one input, both ends included.

    `size` is the length of dimension `dim`. `first` is the input's first element; for a tensor on a GPU reading it
    waits for the device, so plans put size conditions first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    measure: Literal["size", "first"]
    dim: int = 0
    at_least: float | None = None
    at_most: float | None = None
    also: tuple[tuple[float | None, float | None], ...] = ()
    """Further bounds (at least, at most), of which one may hold instead."""

    def holds(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the inputs of a call meet the bound; an input that is absent does not."""
        value = inputs.get(self.input)
        if value is None:
            return False
        if self.measure == "size":
            if not isinstance(value, Tensor) or value.dim() <= self.dim:
                return False
            measured = float(value.shape[self.dim])
        else:
            measured = float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
        return any(
            (low is None or measured >= low) and (high is None or measured <= high)
            for low, high in ((self.at_least, self.at_most), *self.also)
        )

    def __str__(self) -> str:
        name = f"{self.input}.shape[{self.dim}]" if self.measure == "size" else f"{self.input}[0]"
        return " or ".join(_bounds(name, *bounds) for bounds in ((self.at_least, self.at_most), *self.also))


def _bounds(name: str, low: float | None, high: float | None) -> str:
    if low is not None and low == high:
        return f"{name} == {low:g}"
    parts = [f"{name} >= {low:g}"] if low is not None else []
    parts += [f"{name} <= {high:g}"] if high is not None else []
    return " and ".join(parts) or f"any {name}"


class PhasePlan(BaseModel):
    """What a phase assumes and when it may run.

    `sizes` maps an input to fixed lengths by dimension; `start_input` names the position input that is known to begin
    at zero, which means that the cache holds nothing that attention may see. `falls` names the input that must fall
    from call to call, where a step builds on what the one before it kept; a phase that `begins` starts anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    conditions: tuple[Condition, ...] = ()
    sizes: dict[str, dict[int, int]] = {}
    start_input: str | None = None
    falls: str | None = None
    begins: bool = False


def plan_steps(timestep: str, ranges: Sequence[StepRange]) -> tuple[PhasePlan, ...]:
    """One phase for each range of denoising steps, told apart by the first element of an input.

    Args:
        timestep: Name of the input that carries the timestep; a guidance batch carries one timestep twice.
        ranges: In order of the steps.
    """
    return tuple(
        PhasePlan(
            name=step.name,
            conditions=()
            if step.at_least is None and step.at_most is None
            else (
                Condition(
                    input=timestep,
                    measure="first",
                    at_least=step.at_least,
                    at_most=step.at_most,
                    also=tuple((span.at_least, span.at_most) for span in step.more),
                ),
            ),
        )
        for step in ranges
    )


def plan_for(plans: Iterable[PhasePlan], bound: Mapping[str, Any]) -> PhasePlan:
    """The first plan whose conditions hold for the arguments of a call.

    Raises:
        InvalidArgument: None does; it says when each would.
    """
    plans = list(plans)
    for plan in plans:
        if all(condition.holds(bound) for condition in plan.conditions):
            return plan
    when = (f"{plan.name} if {' and '.join(map(str, plan.conditions)) or 'nothing else'}" for plan in plans)
    raise InvalidArgument(f"no phase takes these inputs: {'; '.join(when)}")


@dataclass
class Phase:
    """One specialised program and the plan that it came from."""

    plan: PhasePlan
    exported: ExportedProgram

    @property
    def name(self) -> str:
        """The phase's name, first part of its sites' ids."""
        return self.plan.name


def state_of(exported: ExportedProgram) -> dict[str, Tensor]:
    """The tensors that a program writes, by fully qualified name."""
    return {
        spec.target: exported.state_dict[spec.target]
        for spec in exported.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION and spec.target is not None
    }


def device_of(exported: ExportedProgram) -> torch.device:
    """The device of the program's first stored tensor; the CPU where it stores none."""
    for tensor in exported.state_dict.values():
        return tensor.device
    return torch.device("cpu")


def move_phases(phases: list[Phase], device: torch.device | str) -> None:
    """Move every phase, and let the phases go on sharing their tensors.

    Raises:
        InvalidArgument: The device is unknown or not there.
    """
    from torch.export.passes import move_to_device_pass

    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidArgument(f"device {device} is not there: {str(error).splitlines()[0]}") from error
    moved: dict[str, Tensor] = {}
    for phase in phases:
        names = dict(phase.exported.state_dict)
        phase.exported = move_to_device_pass(phase.exported, str(device))
        for name, original in names.items():
            key = f"{original.untyped_storage().data_ptr()}/{name}"
            phase.exported.state_dict[name] = moved.setdefault(key, phase.exported.state_dict[name])
