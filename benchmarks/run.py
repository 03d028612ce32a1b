"""Runs a table of measurements and prints it: what `graphwright bench` does."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from graphwright.benchmarks.reuse_table import reuse_table
from graphwright.benchmarks.spine_table import spine_table
from graphwright.benchmarks.video_table import video_table
from graphwright.errors import InvalidArgument, InvalidFile
from graphwright.inspection.tables import Table

TABLES = ("spine", "video", "reuse")


def run_table(which: str, *, as_json: bool, quick: bool, output: Path, console: Console) -> None:
    """Measure a table and print it.

    Args:
        which: "spine", "video" or "reuse".
        as_json: Print everything that was measured as JSON.
        quick: Fewer repeats, shorter texts, fewer layers: rougher figures.
        output: Folder for pictures, and for the study of a search.
        console: Where to print.

    Raises:
        InvalidArgument: There is no such table.
        InvalidFile: There is no such folder.
    """
    if which not in TABLES:
        raise InvalidArgument(f"unknown table {which!r}; there are {', '.join(TABLES)}")
    if not output.is_dir():
        raise InvalidFile(f"{output}: there is no such folder")
    if which == "spine":
        rows, measured = spine_table(quick)
    else:
        rows, measured = (video_table if which == "video" else reuse_table)(quick, output, console)
    if as_json:
        print(json.dumps(measured, indent=1))
        return
    table = Table("what", "measured", "at least", "holds")
    for what, value, wanted, holds in rows:
        table.add_row(what, value, wanted, "-" if wanted == "-" else "yes" if holds else "NO")
    console.print(table)
