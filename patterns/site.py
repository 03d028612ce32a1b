"""What every site has in common: a stable id, the node whose value it produces, and facts for people to read.

An id is `<phase>/<module path>/<kind>[<ordinal>]`: where the node was traced and how many of its kind came
before it there, so it survives renamed nodes and is the same in all phases of one program but for the first part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from torch.fx import Node

from .graph import Refusal

S = TypeVar("S", bound="Site")


@dataclass(frozen=True)
class Site(ABC):
    """A matched place, with the facts that were proved about it.

    Attributes:
        id: `<phase>/<module path>/<kind>[<ordinal>]`, unique in a phase.
        node: The node whose value the site produces.
        module_path: Innermost module that the node was traced in, "" where it is unknown.
        source: Source line of the model, "" where it is unknown.
    """

    kind: ClassVar[str]
    """Last part of the id: `attention`, `linear`..."""

    id: str
    node: Node
    module_path: str
    source: str

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Facts for tables: shapes, dtypes, roles, by name."""

    @property
    def phase(self) -> str:
        """The phase that the site was found in."""
        return self.id.split("/", 1)[0]

    @property
    def place(self) -> str:
        """The id without its phase: one place in the model, whatever the phase."""
        return self.id.split("/", 1)[1]


@dataclass(frozen=True)
class Found(Generic[S]):
    """What a matcher gives: the sites in graph order, and for each anchor that is no site the fact that failed."""

    sites: tuple[S, ...]
    refusals: tuple[Refusal, ...] = ()

    @property
    def nearest_miss(self) -> Refusal | None:
        """The refusal that came furthest, the first one of several; None where nothing was refused."""
        return max(self.refusals, key=lambda refusal: refusal.depth, default=None)


class Ordinals:
    """Gives out ids: counts each kind of site within each module.

    Ask for an id at every anchor, also one that is refused later, so that what one phase refuses does not shift the ids
    of another.

    Args:
        phase: First part of the ids.
    """

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._count: Counter[tuple[str, str]] = Counter()

    def next_id(self, module_path: str, kind: str) -> str:
        """The id of the next site of a kind in a module; a site outside any module has no middle part."""
        ordinal = self._count[module_path, kind]
        self._count[module_path, kind] += 1
        return "/".join(part for part in (self._phase, module_path, f"{kind}[{ordinal}]") if part)
