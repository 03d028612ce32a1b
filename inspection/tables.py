"""Tables for terminals of any width: a name is never cut, since a name that is cut cannot be searched for.

rich shortens what does not fit with an ellipsis. Here each column is as wide as its longest word at least; what is left
goes where text would wrap most. A table that does not fit even so is printed row by row, a line for each column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import rich.table
from rich import box
from rich.console import Console, ConsoleOptions, OverflowMethod, RenderResult
from rich.measure import Measurement
from rich.text import Text


class Table(rich.table.Table):
    """A rich table that wraps between words, and is turned into a list where it would have to cut them."""

    def __init__(self, *headers: Any, **options: Any) -> None:
        super().__init__(*headers, **{"title_justify": "left", **options})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.columns:
            return
        spans = [self._span(console, options, number) for number in range(len(self.columns))]
        count = len(spans)
        for shape, edges, padding in ((self.box, count + 1, (1, 1)), (box.SIMPLE_HEAD, count - 1, (0, 1))):
            room = options.max_width - edges - sum(padding) * count
            if sum(span.minimum for span in spans) <= room:
                yield from self._drawn(console, options, shape, padding, share(spans, room))
                return
        yield from self._listed(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def _span(self, console: Console, options: ConsoleOptions, number: int) -> Measurement:
        column = self.columns[number]
        wide = options.update(max_width=10_000)
        cells = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        least = max(cell.minimum for cell in cells)
        most = max(cell.maximum for cell in cells)
        return Measurement(most if column.no_wrap else min(least, _LONGEST_WORD), most)

    def _drawn(
        self, console: Console, options: ConsoleOptions, shape: Any, padding: tuple[int, int], widths: Sequence[int]
    ) -> RenderResult:
        before = self.box, self.padding, self.show_edge, [(c.width, c.overflow) for c in self.columns]
        left, right = padding
        self.box, self.padding, self.show_edge = shape, (0, right, 0, left), shape is before[0]
        for column, width in zip(self.columns, widths, strict=True):
            column.width, column.overflow = width, cast(OverflowMethod, "fold")
        try:
            yield from super().__rich_console__(console, options)
        finally:
            self.box, self.padding, self.show_edge, columns = before
            for column, (width, overflow) in zip(self.columns, columns, strict=True):
                column.width, column.overflow = width, cast(OverflowMethod, overflow)

    def _listed(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield from console.render(Text.from_markup(str(self.title), style="italic"), options)
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for number, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                text = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
                if text.plain and (number == 0 or text.plain != "-"):
                    name = Text(f"{column.header}: " if str(column.header) else "", style="dim")
                    lines = Text.assemble("" if number == 0 else "  ", name, text)
                    lines.overflow = "fold"
                    yield from console.render(lines, options)


_LONGEST_WORD = 60
"""Longer words are paths and lists: they are folded where there is no room, which does not cut them."""


def share(spans: Sequence[Measurement], room: int) -> list[int]:
    """Widths of columns: the least, and of the rest of the room a part to each in proportion to what it lacks.

    Args:
        spans: For each column the width of its longest word and the width at which nothing wraps.
        room: The sum that they may have, at least the sum of the minima.
    """
    lacking = [span.maximum - span.minimum for span in spans]
    spare = min(room - sum(span.minimum for span in spans), sum(lacking))
    total = sum(lacking) or 1
    widths = [span.minimum + lack * spare // total for span, lack in zip(spans, lacking, strict=True)]
    for number, span in enumerate(spans):  # what rounding left over
        if sum(widths) < sum(s.minimum for s in spans) + spare and widths[number] < span.maximum:
            widths[number] += 1
    return widths
