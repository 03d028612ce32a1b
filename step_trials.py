"""What a method may try before the phases are cut: a program with a phase for each of its variants, and its samplings.

A search over denoising steps (ASTRAEA's budgets) decides which steps share a phase, so it comes before there are
phases. It gets one program that holds every variant, and says for each sampling which variant runs in which step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .build import build
from .capture import Captured
from .errors import InvalidArgument, InvalidType
from .passes.decision import Decision
from .patterns.steps import DEFAULT_TIMESTEPS, StepRange
from .prepare import prepare
from .profiles.method import Context
from .profiles.profile import Profile, fingerprint
from .program import Program
from .program_module import ProgramModule
from .progress import Progress


@dataclass(frozen=True)
class StepTrials:
    """The captured model, before methods decide.

    Attributes:
        captured: The model.
        items: The user's calibration.
        progress: Where long work shows how far it is.
    """

    captured: Captured
    items: Sequence[Any]
    progress: Progress

    @property
    def timesteps(self) -> Sequence[float]:
        """Of the sampling runs, one a step."""
        return self.captured.facts.get("timesteps") or DEFAULT_TIMESTEPS

    def variants(self, names: Sequence[str], decide: Callable[[Context], list[Decision]]) -> Variants:
        """Make a program with a phase for each variant.

        Args:
            names: Of the phases, the first step's first.
            decide: Says what is to be done in each of them.

        Raises:
            InvalidArgument: There is no sampler among the calibration items, or a variant cannot be made.
        """
        samplers = [item for item in self.items if callable(item)]
        if not samplers:
            raise InvalidArgument("a search over denoising steps needs samplers as calibration, and there are none")
        prepared = prepare(self.captured, [StepRange(name=name, first=0, last=0) for name in names])
        context = Context(prepared.exported, prepared.sites, {}, self.captured.facts, prepared.steps, self.progress)
        profile = Profile(fingerprint=fingerprint(prepared.exported), data="", decisions=decide(context))
        return Variants(build(prepared, profile), samplers, self.timesteps)


class Variants:
    """A program with several variants of the model, sampled as a table says.

    Args:
        program: One phase a variant.
        samplers: Each samples one prompt with the denoiser that it is given.
        timesteps: Of the sampling runs.
    """

    def __init__(self, program: Program, samplers: Sequence[Callable[[Any], Any]], timesteps: Sequence[float]) -> None:
        self.program = program
        self._samplers = samplers
        self._edges = [(a + b) / 2 for a, b in pairwise(timesteps)]

    def sample(self, table: Sequence[str]) -> list[Tensor]:
        """What each sampler returns when step i runs variant `table[i]`.

        Raises:
            InvalidType: A sampler returned no tensor.
        """
        found = []
        for number, sampler in enumerate(self._samplers):
            with torch.no_grad():
                output = sampler(_Steered(self.program, table, self._edges))
            if not isinstance(output, Tensor):
                raise InvalidType(f"sampler {number} returned {type(output).__name__}, expected a tensor to compare")
            found.append(output.detach().clone())
        return found


class _Steered(ProgramModule):
    """Runs the phase that a table names for the step."""

    def __init__(self, program: Program, table: Sequence[str], edges: Sequence[float]) -> None:
        super().__init__(program)
        self._table, self._edges = table, edges

    def run(self, *args: Any, **kwargs: Any) -> Any:
        bound, _, flat = self.program.dispatch(*args, **kwargs)
        timestep = float(torch.as_tensor(bound[self.program.facts["timestep"]]).flatten()[0])
        step = sum(timestep < edge for edge in self._edges)
        if step == 0:
            self.program.reset()
        return self.program.run_phase(self._table[step], flat)
