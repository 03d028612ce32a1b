"""Published settings of well-known models, as data: `presets/<model>.json`.

Each says where it was published, which figures go with it there, what had to be inferred, and whether it was run here
on the model's own weights.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import InvalidArgument
from .method import Method, method_named

_FOLDER = Path(__file__).parent / "presets"


class Preset(BaseModel):
    """A method with a model's published options.

    Attributes:
        name: `model/method`.
        model: Model and size that it was published for.
        method: Name of the method.
        options: Its options.
        source: Where it was published.
        published: The figures that go with it there.
        inferred: What the publication leaves open and how it was read; empty where nothing is.
        verified: Whether it was run here on the model's own weights.
        reason: Why not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str
    method: str
    options: dict[str, Any]
    source: str
    published: str
    inferred: str = ""
    verified: bool
    reason: str = ""

    def make(self) -> Method:
        """The method with these options."""
        return method_named(self.method, self.options)


@cache
def presets() -> dict[str, Preset]:
    """Every preset, by name."""
    found = {}
    for path in sorted(_FOLDER.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        for setting in values["settings"]:
            preset = Preset(model=values["model"], **setting)
            found[preset.name] = preset
    return found


def preset(name: str) -> Method:
    """The method of a preset.

    Raises:
        InvalidArgument: There is no such preset; the message lists those that there are.
    """
    known = presets().get(name)
    if known is None:
        raise InvalidArgument(f"unknown preset {name!r}; there are {', '.join(presets())}")
    return known.make()
