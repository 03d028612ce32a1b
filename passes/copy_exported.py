"""Copies of exported programs that can be rewritten without changing the original, and share its tensors."""

from __future__ import annotations

import copy

import torch
from torch.export import ExportedProgram
from torch.fx import Node


def copy_exported(exported: ExportedProgram) -> ExportedProgram:
    """A program with its own graph and signature that shares every tensor with the original."""
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(exported.graph, mapping)
    end = graph.output(output)
    for node, copied in mapping.items():
        # A graph renames what is called like a Python builtin (`input`); the signature knows it by its old name.
        copied.name = node.name
    end.meta = dict(exported.graph.output_node().meta)
    signature = exported.graph_signature
    return ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=type(signature)(
            [copy.copy(spec) for spec in signature.input_specs], [copy.copy(spec) for spec in signature.output_specs]
        ),
        state_dict=dict(exported.state_dict),
        range_constraints=dict(exported.range_constraints),
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=dict(exported.constants),
        verifiers=exported.verifiers,
    )
