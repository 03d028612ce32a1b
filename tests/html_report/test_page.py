"""The page in a browser: it opens without errors, everything that can be done there works, and axe finds no barrier."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.html_report.programs import HOSTILE, canonical, long_program, quantized

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    hostile = canonical()
    facts, hostile.facts = hostile.facts, hostile.facts | {"name": HOSTILE}
    hostile.note(HOSTILE, HOSTILE, HOSTILE)
    written = {"hostile": hostile.html(folder / "hostile.html")}
    hostile.facts = facts
    hostile.history.measured.pop("figures")
    written["canonical"] = canonical().html(folder / "canonical.html")
    written["quantized"] = quantized().html(folder / "quantized.html")
    written["long"] = long_program(10_000).html(folder / "long.html")
    return written


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, pages) -> Iterator[Any]:
    """A function that opens a page; afterwards nothing may have been reported to the console."""
    said: list[str] = []
    contexts = []

    def opened(name: str, size: str = "wide", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else 0
        )
        page.goto(pages[name].as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def titles(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".canvas:visible g.node text:first-of-type").all_text_contents()]


def find(page: Any, text: str, which: int = 0) -> None:
    page.fill("#search", text)
    page.locator(".found li button").nth(which).click()


def test_it_opens_with_all_parts(visit):
    page = visit("quantized")
    assert page.locator("main h2").all_text_contents() == ["Summary", "Graph", "Decisions", "Pictures", "Passes"]
    assert page.locator("#summary").inner_text().count("MB") >= 2
    assert page.title() == "graphwright: llama, causal_lm"


def test_a_module_opens_and_closes_with_the_mouse_and_with_keys(visit):
    page = visit("quantized")
    layers = page.locator("g.group", has_text="▸ layers").first
    layers.click()
    assert any(title.endswith("▸ layers.0") for title in titles(page))
    first = page.locator("g.group", has_text="▸ layers.0").first
    first.focus()
    page.keyboard.press("Enter")
    assert any(title.endswith("▸ mlp") for title in titles(page))
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    before = page.evaluate("document.activeElement.dataset.key")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.key") != before
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    assert not any(title.endswith("▸ mlp") for title in titles(page))


def test_search_finds_modules_operators_and_weights(visit):
    page = visit("quantized")
    for text, expected in (
        ("int8_linear", "int8_linear"),
        ("layers.1.mlp", "mlp"),
        ("embed_tokens.weight", "embedding"),
    ):
        page.fill("#search", text)
        assert (
            expected in page.locator(".found li").first.inner_text() or expected in page.locator(".found").inner_text()
        )
    page.fill("#search", "no such thing")
    assert page.locator(".found li").all_text_contents() == ["Nothing of that name."]
    find(page, "int8_linear")
    assert page.locator("g.selected").count() == 1
    assert page.locator("g.selected").is_visible()


def test_a_node_shows_what_is_known_of_it(visit):
    page = visit("quantized")
    page.select_option("#phase", "prefill")
    find(page, "int8_linear")
    details = page.locator(".details")
    text = details.inner_text()
    for expected in (
        "graphwright.int8_linear.default",
        "float32[",
        "_proj",
        "modeling_llama.py",
        "quantize_linear",
        "kept",
    ):
        assert expected in text
    details.locator("summary").click()
    assert "File " in details.locator("pre").inner_text()
    details.get_by_role("button", name="Show in the table").first.click()
    assert page.locator("table.decisions tbody tr").count() >= 1
    page.locator("table.decisions .link").first.click()
    assert page.locator("g.selected").count() == 1


def test_the_slider_goes_back_over_the_passes(visit):
    page = visit("quantized")
    slider = page.locator("#step")
    last = int(slider.get_attribute("max"))
    assert last >= 5
    assert "stack_linears" in page.locator("output").inner_text()
    now = page.locator("#graph .status").first.inner_text()
    slider.focus()
    for _ in range(last):
        page.keyboard.press("ArrowLeft")
    assert "0 of" in page.locator("output").inner_text()
    assert page.locator("#graph .status").first.inner_text() != now
    page.fill("#search", "scaled_dot_product_attention")  # raised later, as the model calls SDPA already
    page.keyboard.press("Escape")
    page.keyboard.press("End")


def test_before_and_after_side_by_side(visit):
    page = visit("quantized")
    page.select_option("#view", "beside")
    assert page.locator(".canvas:visible").count() == 2
    page.locator("g.group", has_text="▸ layers").last.click()
    find(page, "int8_linear")
    left, right = (page.locator(".canvas").nth(i) for i in (0, 1))
    assert left.locator("g.removed").count() > 0
    assert left.locator("g.added").count() == 0
    assert right.locator("g.added").count() > 0
    assert right.locator("g.removed").count() == 0


def test_decisions_are_filtered_and_sorted(visit):
    page = visit("quantized")
    rows = page.locator("table.decisions tbody tr")
    page.select_option("#filter-status", "rolled_back")
    assert {row.split("\t")[4] for row in rows.all_inner_texts()} == {"rolled back"}
    page.select_option("#filter-status", "refused")
    assert "role head is not asked for" in rows.first.inner_text()
    page.select_option("#filter-status", "")
    page.get_by_role("button", name="measured speed-up").click()
    values = [float(text.rstrip("x")) for text in rows.locator("td:nth-child(7)").all_inner_texts() if text]
    assert values == sorted(values, reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text() == "measured speed-up"
    page.fill("#filter-text", "layers.1.mlp.up")
    assert rows.count() == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_reader(visit, scheme):
    page = visit("quantized", scheme=scheme)
    colour = "getComputedStyle(document.body).backgroundColor"
    first = page.evaluate(colour)
    assert (sum(map(int, first[4:-1].split(","))) > 380) == (scheme == "light")
    page.locator("#theme").click()
    assert page.evaluate(colour) != first


@pytest.mark.parametrize("name", ["quantized", "canonical", "long", "hostile"])
def test_nothing_is_wider_than_a_phone(visit, name):
    page = visit(name, "narrow")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES["narrow"][0]


@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("narrow", "dark")])
def test_axe_finds_no_serious_barrier(visit, size, scheme):
    page = visit("quantized", size, scheme)
    find(page, "int8_linear")
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response
    serious = [
        f"{each['id']}: {each['help']}: {[node['target'] for node in each['nodes'][:3]]}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_names_stay_text(visit):
    page = visit("hostile")
    assert page.locator("h1").inner_text().startswith("<img src=x")
    assert "broken" not in page.evaluate("document.title.replace(/[^]*'(broken)'[^]*/, '')")
    assert page.locator("main img").count() == 0
    assert page.locator("#summary td").filter(has_text="onerror").count() == 3


def test_ten_thousand_nodes_are_closed_and_open_by_steps(visit):
    page = visit("long")
    assert 0 < len(titles(page)) <= 60
    page.locator("g.group").first.click()
    assert 0 < len(titles(page)) <= 120
    find(page, "cos_default_4000")
    assert "cos_default_4000" in page.locator(".details h3").first.inner_text()


def test_nothing_was_measured(visit):
    page = visit("canonical")
    text = page.locator("main").inner_text()
    assert "No method was asked for" in text
    assert "program.note(" in text
    assert "No method left figures to draw" in text


def test_all_decisions_are_printed(visit):
    page = visit("quantized")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("table.decisions tbody tr").count() == 45
    assert not page.locator("#search").is_visible()


def test_a_call_that_joins_linears_shows_the_decision_of_each(visit):
    page = visit("quantized")
    find(page, "int8_linear")
    details = page.locator("aside.details")
    assert "Made by stack_linears" in details.inner_text()
    assert details.locator(".card").count() == 3  # query, key and value
