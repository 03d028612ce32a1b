"""What prints as a rich table on a terminal and as plain text elsewhere."""

from __future__ import annotations

import html
import json
from abc import ABC, abstractmethod
from typing import Any

from rich.console import Console, RenderableType

WIDTH = 118
"""Columns of what is printed as plain text."""


class Printable(ABC):
    """Base of reports: `print` gives text, `.to_json()` plain data, a notebook a table."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """What a terminal shows."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""

    def __str__(self) -> str:
        console = Console(width=WIDTH, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f'<pre style="line-height: 1.2">{html.escape(str(self))}</pre>'


def dump_json(value: Printable) -> str:
    """A report as JSON text."""
    return json.dumps(value.to_json(), indent=1, default=str)
