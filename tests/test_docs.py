"""The manual is true: every Python block of README.md and docs/ runs as it stands, every link leads somewhere.

The blocks of a page share one namespace, from the first to the last. A block is left out only where an HTML comment
`<!-- not run: reason -->` stands before it. Pages that load SmolLM2 run on its first two layers.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import graphwright as gw
from graphwright import cli
from graphwright.benchmarks.timing import one_thread
from graphwright.examples import load_smollm2
from graphwright.html_report import picture
from graphwright.passes import base
from graphwright.profiles import method

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S[^>]* -->\n+$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[str]:
    """The Python blocks that are to be run, each moved down to its own line so that errors name it."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[1] == "python" and not NOT_RUN.search(text[: found.start()]):
            yield "\n" * (text[: found.start(2)].count("\n")) + found[2]


@pytest.fixture
def page_module(monkeypatch, tmp_path) -> ModuleType:
    """An empty module in an empty folder; what a page registers is forgotten after it."""
    # The package's own methods, passes and pictures are registered first, since they would be forgotten too.
    method.methods()
    base.pass_named("quantize_linear")
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(method, "METHODS", dict(method.METHODS))
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(picture, "PICTURES", list(picture.makers()))
    two_layers = functools.partial(load_smollm2.load_smollm2, layers=2)
    monkeypatch.setattr(load_smollm2, "load_smollm2", two_layers)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name_of)
def test_code_runs(page: Path, page_module: ModuleType) -> None:
    with one_thread():  # on a busy machine two threads wait for each other, at every small operator
        for code in blocks(page):
            exec(compile(code, str(page), "exec"), vars(page_module))


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{name_of(page)} links to {target}"
        assert other.is_relative_to(ROOT), f"{name_of(page)} links out of the project: {target}"
        assert not anchor or anchor in anchors(other), f"{name_of(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get on GitHub."""
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(LINK.findall(index))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"} <= linked


def test_every_public_name_is_explained() -> None:
    manual = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in gw.__all__ if f"gw.{name}" not in manual] == []


def test_every_method_and_command_is_in_the_manual() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    public = [kind.__name__ for kind in gw.methods().values() if kind.__module__.startswith("graphwright.profiles.")]
    assert "Int8" in public  # tests and benchmarks declare methods of their own
    assert [name for name in public if f"`{name}`" not in readme] == []
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^## `graphwright (\w+)`", page, re.MULTILINE))
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert headings == commands


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_a_block_says_what_it_holds(page: Path) -> None:
    kinds = {kind for kind, _ in FENCE.findall(page.read_text(encoding="utf-8"))}
    assert kinds <= {"python", "bash", "text", "json"}, f"{name_of(page)} has a block without one of these languages"
