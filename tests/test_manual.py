"""The manual builds as a site without a warning: navigation, links, anchors, and the reference from docstrings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'graphwright[docs]'")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install 'graphwright[docs]'")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_is_there(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (site / "project").glob("*.html")} == {
        "readme",
        "contributing",
        "changelog",
        "benchmarks",
    }


def test_links_between_the_two_parts_lead_somewhere(site):
    assert 'href="project/readme.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="../architecture.html"' in (site / "project" / "contributing.html").read_text(encoding="utf-8")


def test_the_reference_has_signatures_and_docstrings(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    for expected in (
        'id="graphwright.optimize.optimize"',
        "calibration",
        "Rewrite a model as methods or a profile decide",
    ):
        assert expected in text
    assert 'id="graphwright.program.Program.explain"' in text


def test_nothing_is_loaded_from_elsewhere(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis.com" not in text
    assert '<script src="http' not in text
