"""How long a program's page takes: to write, to open in Chromium, and to open each module in it.

    python benchmarks/page.py model.gw

Opening is timed from the request to the second frame after everything is drawn; a module from the click to the next
frame, for every closed module of the first phase in turn, from the outermost inwards, until so many are open.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import graphwright as gw

_CLICK = """element => {
  const started = performance.now();
  element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  document.body.offsetHeight;
  return new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now() - started))));
}"""
_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def measure(program: gw.Program, modules: int) -> dict[str, float]:
    """Seconds to write and to open the page, its bytes, and the most milliseconds that a module took."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        started = time.perf_counter()
        path = program.html(Path(folder) / "page.html")
        written = time.perf_counter() - started
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        started = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.evaluate(_FRAMES)
        opened = time.perf_counter() - started
        took = [_open_next(page) for _ in range(modules) if page.locator("g.group").count()]
        size = path.stat().st_size
        browser.close()
    return {
        "bytes": size,
        "write_s": written,
        "open_s": opened,
        "module_ms": max(took, default=0.0),
        "modules": len(took),
    }


def _open_next(page: Any) -> float:
    return page.evaluate(_CLICK, page.locator("g.group").first.element_handle())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="a .gw file")
    parser.add_argument("--modules", type=int, default=60, help="how many modules are opened, all at once")
    options = parser.parse_args()
    found = measure(gw.load(options.program), options.modules)
    print(f"page: {found['bytes'] / 1e6:.2f} MB, written in {found['write_s']:.2f} s")
    print(f"open in Chromium: {found['open_s']:.2f} s (at most 3)")
    print(f"open a module: {found['module_ms']:.0f} ms, the longest of {found['modules']:.0f} (at most 200)")


if __name__ == "__main__":
    main()
