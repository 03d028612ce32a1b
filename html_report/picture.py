"""Pictures of methods: each is data of one of a few kinds, which the page knows how to draw.

A method adds its picture with one function:

    @picture
    def hits_by_layer(program: Program) -> Picture | None:
        figures = program.profile.measured.get("my_method")
        return None if figures is None else Picture("Hits by layer", "bars", {...}, "What is to be seen.")

The kinds and their data:

    heatmap   rows, columns: labels; values: list a row of numbers, or of texts, which are categories; unit
    points    x, y: labels of the axes; series: [{name, points: [[x, y], ...], line: bool}];
              limit: an x to mark, level: a y to mark; either may be absent
    bars      labels; unit; series: [{name, values}]
    images    rows: [{label, images: [{label, source}]}]; source is a `data:` address, see `png.py`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..program import Program

Kind = Literal["heatmap", "points", "bars", "images"]


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        title: What it shows.
        kind: How it is drawn.
        data: What is drawn, as plain data; see the file's docstring.
        caption: How to read it.
    """

    title: str
    kind: Kind
    data: dict[str, Any]
    caption: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"title": self.title, "kind": self.kind, "caption": self.caption, **self.data}


Maker = Callable[["Program"], "Picture | list[Picture] | None"]
PICTURES: list[Maker] = []
"""Registered makers, in the order in which their pictures are shown."""


def picture(maker: Maker) -> Maker:
    """Register a function that makes a picture, several, or None where a program has nothing to show."""
    PICTURES.append(maker)
    return maker


def makers() -> list[Maker]:
    """All registered makers, the package's own among them."""
    from . import method_pictures  # noqa: F401  what it imports registers itself

    return PICTURES


def pictures_of(program: Program) -> list[Picture]:
    """All pictures of a program."""
    found: list[Picture] = []
    for maker in makers():
        made = maker(program)
        found += made if isinstance(made, list) else [made] if made is not None else []
    return found
