"""Run a program node by node, over all inputs at once: the values of one layer live, those behind it are gone.

Calibration that changes a layer before it looks at the next one needs that layer's inputs for all texts, and nothing
else. So every node is computed for all inputs before the next node is; what no later node reads is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from ..passes.dialects import graph_arguments

Handler = Callable[[list[tuple[Any, ...]]], list[Any]]
"""From a node's arguments for each input to its value for each input, in place of calling its operator."""


def walk(exported: ExportedProgram, inputs: Sequence[list[Any]], handlers: Mapping[Node, Handler]) -> None:
    """Compute a program's nodes up to the last one that has a handler.

    Args:
        exported: A functional program; it is not changed.
        inputs: Flat inputs.
        handlers: What computes some nodes instead of their operators, and may look at their arguments.
    """
    nodes = list(exported.graph.nodes)
    end = max((position for position, node in enumerate(nodes) if node in handlers), default=-1)
    last_use: dict[Node, int] = {}
    for position, node in enumerate(nodes[: end + 1]):
        for argument in node.all_input_nodes:
            last_use[argument] = position
    runs: list[dict[Node, Any]] = []
    placeholders = [node for node in nodes if node.op == "placeholder"]
    for flat in inputs:
        runs.append(dict(zip(placeholders, graph_arguments(exported, flat), strict=True)))
    with torch.no_grad():
        for position, node in enumerate(nodes[: end + 1]):
            if node.op == "placeholder":
                continue
            calls = [_arguments(node, values) for values in runs]
            if node in handlers:
                results = handlers[node]([args for args, _ in calls])
            elif node.op == "get_attr":
                results = [getattr(exported.graph_module, str(node.target))] * len(runs)
            else:
                target: Any = node.target
                results = [target(*args, **kwargs) for args, kwargs in calls]
            del calls
            for values, result in zip(runs, results, strict=True):
                if node in last_use:  # what is only written to a state is not kept for each text
                    values[node] = result
                for argument in node.all_input_nodes:
                    if last_use[argument] == position:
                        values.pop(argument, None)


def _arguments(node: Node, values: dict[Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: values[argument])
    return args, kwargs
