"""A program as engines for Ada and Blackwell, and what they say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graphwright as gw

CARDS = ["sm_89", "sm_120"]


def built(program: gw.Program, folder: Path) -> dict[str, dict[str, Any]]:
    """What the description says of each phase, by its name."""
    pytest.importorskip("tensorrt_rtx")
    program.export(folder / "m.engine", compute_capabilities=CARDS)
    told = json.loads((folder / "m.engine.json").read_text())
    assert told["compute_capabilities"] == CARDS
    for phase in told["phases"]:
        assert (folder / phase["file"]).stat().st_size > 1e6
    return {phase["plan"]["name"]: phase for phase in told["phases"]}


def count(phase: dict[str, Any], kind: str) -> int:
    """How many layers of a kind a phase has."""
    return sum(layer["kind"] == kind for layer in phase["layers"])
