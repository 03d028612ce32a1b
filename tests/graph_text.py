"""Graphs as text in tests: a module made functional, and `filecheck` in this process."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from typing import Any

import torch
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts
from torch import nn
from torch.export import ExportedProgram, export

from graphwright.patterns.text import graph_text


def functional(model: nn.Module, *args: Any, dynamic_shapes: Any = None) -> ExportedProgram:
    """What every pass starts from: exported, then made functional."""
    with torch.no_grad():
        program = export(model.eval(), args, dynamic_shapes=dynamic_shapes, strict=False)
        return program.run_decompositions({})


def operators(exported: ExportedProgram) -> list[str]:
    """The operators in graph order, without namespace and overload: `["linear", "add"]`."""
    return [
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in exported.graph.nodes
        if node.op == "call_function"
    ]


def check_text(program: ExportedProgram | Iterable[str], checks: str) -> None:
    """Match a graph's text against `CHECK` lines; a mismatch prints both."""
    lines = graph_text(program) if isinstance(program, ExportedProgram) else list(program)
    text = "\n".join(lines) + "\n"
    options = Options(match_filename="checks", input_file="graph")
    patterns = io.StringIO(textwrap.dedent(checks))
    matcher = Matcher(options, FInput("graph", text), Parser(options, patterns, *pattern_for_opts(options)))
    assert matcher.run() == 0, f"the graph\n{text}does not match\n{checks}"
