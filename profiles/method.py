"""What a method is: typed options, a reference, and `decide`, which turns sites into decisions.

Subclasses register themselves by name, so a file in this folder (or in another package) is all that a new method needs:
search, budget, report, replay and export come with the decisions.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import InvalidArgument
from ..passes.decision import Decision
from ..patterns.find import Sites
from ..patterns.steps import Schedule, StepRange
from ..progress import Progress

METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Context:
    """What a method may look at when it decides.

    Attributes:
        phases: The canonical program of each phase.
        sites: Their sites.
        calibration: Flat inputs by phase, empty where the user gave none.
        facts: What capture knows of the model.
        steps: Phase -> its denoising steps; empty where phases are something else.
        progress: Where long work shows how far it is.
        keep: "faster", or "smaller" where variants are wanted whatever their speed.
        build: Makes the program that some decisions give, for methods that search by trying; None where it cannot be.
            A second argument names the phases that are wanted, to build faster.
        measured: Where a method leaves what it measured, by its name; it becomes the profile's.
        tensors: What decisions name: rotations, rounded weights. The method fills it, the profile keeps it.
    """

    phases: Mapping[str, ExportedProgram]
    sites: Mapping[str, Sites]
    calibration: Mapping[str, Sequence[list[Any]]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, StepRange] = field(default_factory=dict)
    progress: Progress = field(default_factory=lambda: Progress(False))
    build: Callable[..., Any] | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keep: str = "faster"

    def cache_places(self, method: str) -> list[str]:
        """The places whose cache is found in every phase, in the order of layers.

        Raises:
            InvalidArgument: No phase has a key-value cache; it names the method.
        """
        found = [[site.place for site in sites.cache] for sites in self.sites.values()]
        if not any(found):
            raise InvalidArgument(f"{method}: the program has no key-value cache")
        return [place for place in found[0] if all(place in others for others in found[1:])]


class Method(BaseModel, ABC):
    """Base of all methods: a pydantic model whose fields are the options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """Name in profiles and on the command line."""
    reference: ClassVar[str]
    """Where the method was published."""
    rewrites: ClassVar[str]
    """What it rewrites, in a few words."""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(str(part) for part in first["loc"]) or "options"
            raise InvalidArgument(f"{type(self).__name__}: {option}: {first['msg']}") from error

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not inspect.isabstract(cls) and "name" in cls.__dict__:
            known = METHODS.setdefault(cls.name, cls)
            if known.__qualname__ != cls.__qualname__ or known.__module__ != cls.__module__:
                raise InvalidArgument(
                    f"{cls.__qualname__}: the method name {cls.name!r} is taken by {known.__qualname__}"
                )
            METHODS[cls.name] = cls

    def instead(self, decision: Decision) -> Decision | None:
        """What to try where a proposal was measured slower than what it replaces; None where there is nothing.

        Args:
            decision: The proposal.
        """
        return None

    def schedule(self, steps: int) -> Schedule | None:
        """In which of a run's denoising steps the method is active; None where it treats all steps alike.

        Args:
            steps: Number of steps of a run.
        """
        return None

    def search_steps(self, trials: Any) -> Method:
        """What is to be known before the steps are cut into phases: a method that searches over steps does it here.

        Args:
            trials: The captured model and the calibration; see `step_trials.py`.

        Returns:
            The method with what it found among its options.
        """
        return self

    @abstractmethod
    def decide(self, context: Context) -> list[Decision]:
        """Say what is to be done where.

        Args:
            context: The program's sites, phase by phase.

        Returns:
            One decision a site that the method looked at; those it declines have status "refused" and a reason.
        """


def methods() -> dict[str, type[Method]]:
    """Every method that there is, by name."""
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(METHODS.items()))


def method_named(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Make a method from its name and options.

    Raises:
        InvalidArgument: No such method, or no such option; the message lists those that there are.
    """
    known = methods()
    kind = known.get(name) or next((m for m in known.values() if m.__name__ == name), None)
    if kind is None:
        raise InvalidArgument(f"unknown method {name!r}; there are {', '.join(known)}")
    return kind(**(options or {}))
