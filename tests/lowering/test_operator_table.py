"""The README's table of operators by targets is the registry's."""

from pathlib import Path

from graphwright.lowering.operator_table import operator_table

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readme_is_current():
    table = operator_table()
    assert "| `int8_linear` |" in table
    assert table in README.read_text(encoding="utf-8")
