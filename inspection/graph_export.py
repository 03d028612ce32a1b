"""A phase's graph for other programs and for people: text, networkx, GraphML, DOT, and `.pt2` for netron.

Names of nodes, modules and weights are those of the exported program, so that a node can be found again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx
import torch

from ..errors import InvalidArgument, InvalidFile
from ..patterns.graph import GraphView
from ..patterns.text import graph_text, type_text

if TYPE_CHECKING:
    from ..program import Program


def phase_text(program: Program, phase: str) -> str:
    """The graph as text: a line for each input, then one a call with its type, operator, arguments and module.

    Raises:
        InvalidArgument: There is no such phase.
    """
    check_phase(program, phase)
    exported = program.phases[phase].exported
    view = GraphView(exported)
    lines = []
    for node in exported.graph.find_nodes(op="placeholder"):
        kind = "input" if view.is_user_input(node) else "state" if view.is_state(node) else ""
        if kind:
            lines.append(f"%{node.name}: {type_text(node)} = {kind} {view.target(node) or ''}".rstrip())
    return "\n".join([*lines, *graph_text(exported)])


def to_networkx(program: Program, phase: str) -> nx.DiGraph:
    """The phase's graph; node attributes are plain strings, so GraphML export works.

    Raises:
        InvalidArgument: There is no such phase.
    """
    check_phase(program, phase)
    exported = program.phases[phase].exported
    view = GraphView(exported)
    graph = nx.DiGraph(phase=phase)
    for node in exported.graph.nodes:
        provenance = node.meta.get("graphwright", {})
        graph.add_node(
            node.name,
            op=node.op,
            target=view.target(node) or str(node.target),
            type=type_text(node),
            module=view.module_path(node),
            source=view.source(node),
            **{f"made_by_{key}": str(value) for key, value in provenance.items()},
        )
        for argument in node.all_input_nodes:
            graph.add_edge(argument.name, node.name)
    return graph


def write_graph(program: Program, phase: str, path: str | Path) -> Path:
    """Write a phase's graph for another viewer; the ending of the path says for which.

    Args:
        program: The program.
        phase: Name of the phase.
        path: `.graphml` (yEd, Gephi, Cytoscape), `.dot` (Graphviz), `.txt`, or `.pt2` (netron, torch.export.load).

    Returns:
        The path.

    Raises:
        InvalidArgument: There is no such phase, or no such format.
        InvalidFile: The path cannot be written.
    """
    path = Path(path)
    check_phase(program, phase)
    if path.suffix not in WRITERS:
        raise InvalidArgument(f"{path}: no graph format {path.suffix!r}; there are {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise InvalidFile(f"{path}: there is no folder {path.parent}")
    try:
        WRITERS[path.suffix](program, phase, path)
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be written: {error.strerror}") from error
    return path


def dot_text(graph: nx.DiGraph) -> str:
    """A graph in the DOT language, modules as clusters.

    Args:
        graph: From `to_networkx`.
    """
    modules: dict[str, list[str]] = {}
    for name, values in graph.nodes(data=True):
        label = "\\n".join(_escaped(part) for part in (name, values["target"], values["type"]))
        modules.setdefault(values["module"], []).append(f'"{_escaped(name)}" [label="{label}"];')
    lines = ["digraph {", "  node [shape=box, fontname=monospace];"]
    for number, (module, nodes) in enumerate(modules.items()):
        if not module:
            lines += [f"  {node}" for node in nodes]
            continue
        lines += [f"  subgraph cluster_{number} {{", f'    label="{_escaped(module)}";']
        lines += [*(f"    {node}" for node in nodes), "  }"]
    lines += [f'  "{_escaped(a)}" -> "{_escaped(b)}";' for a, b in graph.edges]
    return "\n".join([*lines, "}", ""])


def check_phase(program: Program, phase: str) -> None:
    """Refuse a phase that is not there.

    Raises:
        InvalidArgument: The program has no such phase.
    """
    if phase not in program.phases:
        raise InvalidArgument(f"no phase {phase!r}; there are {', '.join(program.phases)}")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


def _write_graphml(program: Program, phase: str, path: Path) -> None:
    nx.write_graphml(to_networkx(program, phase), path)


def _write_dot(program: Program, phase: str, path: Path) -> None:
    path.write_text(dot_text(to_networkx(program, phase)), encoding="utf-8")


def _write_text(program: Program, phase: str, path: Path) -> None:
    path.write_text(phase_text(program, phase) + "\n", encoding="utf-8")


def _write_pt2(program: Program, phase: str, path: Path) -> None:
    torch.export.save(program.phases[phase].exported, path)


WRITERS: dict[str, Callable[[Program, str, Path], None]] = {
    ".graphml": _write_graphml,
    ".dot": _write_dot,
    ".txt": _write_text,
    ".pt2": _write_pt2,
}
"""Ending -> what writes it."""
