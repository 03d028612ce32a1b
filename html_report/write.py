"""Write a program's page: data as JSON, the page's own code and style, all in one file that loads nothing else.

The page is built from `page/` (readable sources and how to build them); `assets/page.min.js` is the built bundle, with
the libraries in it. Names from a model are data, never markup: JSON is escaped so that it cannot end its element, the
page's code sets text and not HTML, and a content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..replace_files import replacing_file
from .decision_data import decisions_data, near_misses
from .graph_data import Strings, phase_data
from .picture import pictures_of
from .summary import summary_data

if TYPE_CHECKING:
    from ..program import Program


def write_html(program: Program, path: str | Path) -> Path:
    """Write the page; an existing file is replaced when the new one is complete.

    Args:
        program: What to show.
        path: Where to write, usually with the ending `.html`.

    Returns:
        The path.

    Raises:
        InvalidFile: The path cannot be written.
    """
    path = Path(path)
    text = page_text(program)
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def page_text(program: Program) -> str:
    """The page as text."""
    return _fill(program_title(program), page_data(program))


def page_data(program: Program) -> dict[str, Any]:
    """What the page shows, as plain data."""
    strings = Strings()
    phases = {name: phase_data(program, name, strings) for name in program.phases}
    return {
        "title": program_title(program),
        "summary": summary_data(program),
        "phases": phases,
        "decisions": decisions_data(program),
        "near": near_misses(program),
        "pictures": [picture.to_json() for picture in pictures_of(program)],
        "strings": strings.texts,
    }


def program_title(program: Program) -> str:
    """The model's name, `facts["name"]` or what its configuration calls it, and its kind."""
    config = program.facts.get("config") or {}
    names = [program.facts.get("name"), *(config.get(key) for key in ("_name_or_path", "_class_name", "model_type"))]
    name = next((str(name) for name in names if name), "")
    return f"{name}, {program.kind}" if name else program.kind


def _fill(title: str, data: dict[str, Any]) -> str:
    code, digest = _script()
    text = json.dumps(data, separators=(",", ":"), default=str)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = _asset("page/page.html")
    parts = {"TITLE": html.escape(title), "DIGEST": digest, "STYLE": _asset("page/style.css"), "SCRIPT": code}
    for name, part in parts.items():
        page = page.replace(f"[[{name}]]", part)
    before, after = page.split("[[DATA]]")
    return before + text + after


@cache
def _script() -> tuple[str, str]:
    code = _asset("assets/page.min.js")
    return code, base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (files(__package__ or __name__) / name).read_text(encoding="utf-8")
