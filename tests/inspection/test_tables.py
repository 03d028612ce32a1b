"""Tables keep every name whole, whatever the width."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.measure import Measurement

from graphwright.inspection.tables import Table, share
from tests.html_report.programs import canonical, quantized


def printed(renderable, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def words(text: str) -> set[str]:
    return set(text.replace("│", " ").replace("┃", " ").split())


def passes_table() -> Table:
    table = Table(title="passes")
    for name in ("phase", "pass", "rewrites", "nodes", "time", "check", "largest difference"):
        table.add_column(name)
    table.add_row("captured", "raise_rms_norm", "61", "1680 -> 1436", "0.41 s", "0.52 s", "3.1e-07")
    table.add_row("prefill", "quantize_linear_int4", "210", "1436 -> 1646", "12.41 s", "0.52 s", "-")
    return table


@pytest.mark.parametrize("width", [200, 118, 80, 60, 40, 30])
def test_no_name_is_cut(width):
    text = printed(passes_table(), width)
    assert "…" not in text
    assert {"raise_rms_norm", "quantize_linear_int4", "captured", "12.41", "rewrites"} <= words(text.replace(":", " "))
    assert all(len(line) <= width for line in text.splitlines())


def test_a_wide_terminal_shows_it_as_rich_would():
    text = printed(passes_table(), 118)
    assert text.splitlines()[1].startswith("┏")
    assert len({len(line) for line in text.splitlines()[1:]}) == 1


def test_a_narrow_terminal_gets_a_list():
    text = printed(passes_table(), 40)
    assert "pass: raise_rms_norm" in text
    assert "largest difference: 3.1e-07" in text


def test_printing_changes_nothing_in_the_table():
    table = passes_table()
    first = printed(table, 118)
    printed(table, 40)
    printed(table, 80)
    assert printed(table, 118) == first


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=8), st.integers(0, 200))
def test_widths_fill_the_room_and_no_column_is_narrower_than_its_words(sizes, spare):
    spans = [Measurement(least, least + more) for least, more in sizes]
    room = sum(span.minimum for span in spans) + spare
    widths = share(spans, room)
    assert sum(widths) == min(room, sum(span.maximum for span in spans))
    assert all(span.minimum <= width <= span.maximum for span, width in zip(spans, widths, strict=True))


@pytest.mark.parametrize("width", [80, 118])
def test_reports_cut_nothing(width):
    for program in (quantized(), canonical()):
        text = printed(program.report(), width)
        assert "…" not in text
        assert {record.name for record in program.history.passes if record.changed} <= words(text)
        assert all(len(line) <= width for line in text.splitlines())
