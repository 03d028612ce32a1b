"""Denoising steps that build on the step before: in which order they may be called, and whose state they see.

A program that keeps tokens from step to step is called in turn by a sampler, perhaps once for each guidance branch. A
run begins with its first step, timesteps fall from call to call, and branches have state of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidArgument
from .phases import Phase


@dataclass
class Branch:
    """One run in progress: the timestep of its last call, None before the first, and its state while others run."""

    last: float | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class StepOrder:
    """What a program knows of the runs in progress.

    Args:
        phases: The program's, by name.
        state: Gives the tensors that its graphs read and write.
        initial: Gives new tensors that hold what they were at capture.
        reset: Sets the tensors back to that.
    """

    def __init__(
        self,
        phases: Mapping[str, Phase],
        state: Callable[[], dict[str, Tensor]],
        initial: Callable[[], dict[str, Tensor]],
        reset: Callable[[], None],
    ) -> None:
        self._phases, self._state, self._initial, self._reset = phases, state, initial, reset
        self._current = Branch()
        self._named: dict[str, Branch] = {}

    def follow(self, bound: dict[str, Any], phase: str) -> None:
        """Begin anew at the first step, refuse one that cannot follow; nothing where steps are independent.

        Raises:
            InvalidArgument: The run did not begin with its first step, or a timestep does not fall.
        """
        plan = self._phases[phase].plan
        if plan.falls is None:
            return
        value = float(torch.as_tensor(bound[plan.falls]).flatten()[0])
        last = self._current.last
        if plan.begins:
            self._reset()
        elif last is None:
            first = next(str(c) for p in self._phases.values() if p.plan.begins for c in p.plan.conditions)
            raise InvalidArgument(
                f"{plan.falls} {value:g} builds on the steps before it, and there were none: begin a run with {first}"
            )
        elif not value < last:
            raise InvalidArgument(
                f"{plan.falls} {value:g} after {last:g}: it must fall from call to call, since a step builds on the one"
                " before. Call guidance branches in one batch, or each within its own cache_context"
            )
        self._current.last = value

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Let calls see state of their own, kept under a name."""
        if not any(phase.plan.falls for phase in self._phases.values()):
            yield
            return
        outer, state = self._current, self._state()
        inner = self._named.setdefault(name, Branch(None, self._initial()))
        outer.tensors = {key: tensor.data for key, tensor in state.items()}
        self._current = inner
        for key, tensor in state.items():
            tensor.data = inner.tensors[key]
        try:
            yield
        finally:
            inner.tensors = {key: tensor.data for key, tensor in state.items()}
            for key, tensor in state.items():
                tensor.data = outer.tensors[key]
            self._current = outer

    def restart(self) -> None:
        """The run in progress is over; the next call has to be a first step."""
        self._current.last = None

    def forget_branches(self) -> None:
        """Drop the state of all branches, as after a move to another device."""
        self._named.clear()
