"""What a pass is: a frozen dataclass whose fields are its options.

A `Pass` changes a whole graph; a `SitePass` changes one matched site as a decision asks. Subclasses register themselves
by name, so a file in this folder (or in another package) is all that a new pass needs.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

from ..errors import InvalidArgument
from ..patterns.graph import Refusal
from .edit import Edit

S = TypeVar("S")


@dataclass(frozen=True)
class PassResult:
    """What a pass reports: how many rewrites it made, and what it declined to rewrite."""

    changed: int
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class _Registered:
    name: ClassVar[str]
    """The pass's name, in profiles and on the command line."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not inspect.isabstract(cls) and "name" in cls.__dict__:
            known = _REGISTRY.setdefault(cls.name, cls)
            if known.__qualname__ != cls.__qualname__ or known.__module__ != cls.__module__:
                raise InvalidArgument(
                    f"{cls.__qualname__}: the pass name {cls.name!r} is taken by {known.__qualname__}"
                )
            _REGISTRY[cls.name] = cls


_REGISTRY: dict[str, type[_Registered]] = {}


@dataclass(frozen=True)
class Pass(_Registered, ABC):
    """A transformation of one phase's graph."""

    exact: ClassVar[bool] = True
    """Whether the program computes the same numbers; exact passes are checked numerically."""
    after: ClassVar[tuple[str, ...]] = ()
    """Passes that have to run earlier, where they run at all."""
    requires: ClassVar[str] = "canonical"
    """Dialect of the graph that the pass takes."""
    ensures: ClassVar[str] = "canonical"
    """Dialect of the graph that the pass leaves."""

    @abstractmethod
    def run(self, edit: Edit) -> PassResult:
        """Transform the graph through `edit`."""


@dataclass(frozen=True)
class SitePass(_Registered, ABC, Generic[S]):
    """A transformation of one site, as a decision asks."""

    exact: ClassVar[bool] = False
    """Whether the site computes the same numbers; exact rewrites are made before variants are measured."""
    ensures: ClassVar[str] = "optimized"
    changes_state: ClassVar[bool] = False
    """Whether it changes what the program keeps between calls, which all phases must agree on: a place is rewritten in
    every phase or in none, and for its memory even where it is slower."""
    by_step: ClassVar[bool] = False
    """Whether a call builds on what the call of the step before kept: timesteps must fall then, and a variant is not
    measured on one call."""
    absorbs: ClassVar[Mapping[str, str]] = {}
    """Passes that it can do as well, before its own work at the same site: name -> the field that takes its options."""

    @abstractmethod
    def guard(self, site: S, edit: Edit) -> str | None:
        """The replacement operator's contract: None where it takes this site, else the reason why not."""

    @abstractmethod
    def rewrite(self, site: S, edit: Edit) -> None:
        """Rewrite the site through `edit`."""


def pass_named(name: str, options: dict[str, Any] | None = None) -> Any:
    """Make a pass from its name and options.

    Args:
        name: A registered name, such as `quantize_linear`.
        options: Values for the pass's fields.

    Returns:
        The pass.

    Raises:
        InvalidArgument: No pass has this name, or it has no such option; the message lists those that there are.
    """
    discover()
    kind = _REGISTRY.get(name)
    if kind is None:
        raise InvalidArgument(f"unknown pass {name!r}; there are {', '.join(sorted(_REGISTRY))}")
    known = {item.name for item in fields(kind)}
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise InvalidArgument(
            f"pass {name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}"
        )
    return kind(**(options or {}))


def discover() -> None:
    """Import every pass of this folder, which registers them and the operators that they call."""
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
