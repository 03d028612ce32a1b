"""What `mkdocs build` does beside rendering: navigation from index.md, and pages from outside docs/.

The pages are read on GitHub as well, where they link to `../README.md` and the like. For the site those files are pages
in `project/`, and links between the two are rewritten. A link to a file that is no page becomes its name.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "project/readme.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
"""File of the project -> page of the site."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_startup(**_: Any) -> None:
    """Lay the package out under its name for the reference: the repository root is the package, and holds more."""
    folder = ROOT / "build" / "api" / "graphwright"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    names = {package.split(".")[1] for package in packages if "." in package}
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in sorted(names))]:
        (folder / path.name).symlink_to(path)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation of the tables of index.md, each under the bold line before it."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    sections: list[tuple[str, list[str]]] = []
    for line in index.splitlines():
        if found := re.fullmatch(r"\*\*(.+)\*\*", line.strip()):
            sections.append((found[1], []))
        elif (found := re.match(r"\| \[[^\]]+\]\(([\w-]+\.md)\) \|", line)) and sections:
            sections[-1][1].append(found[1])
    nav: list[Any] = ["index.md", *({title: pages} for title, pages in sections)]
    config.nav = [*nav, {"The project": list(OUTSIDE.values())}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between docs/ and the rest of the project."""
    source = next((path for path, name in OUTSIDE.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")
    folder = (ROOT / source).parent

    def rewritten(link: re.Match[str]) -> str:
        picture, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        path = (folder / target).resolve()
        inside = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else target
        name = OUTSIDE.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        if name is None:
            return f"`{inside}`"
        up = "../" * page.file.src_uri.count("/")
        return f"{picture}[{text}]({up}{name}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(rewritten, part) for part in parts)
