"""What follows the translation to ONNX: names, 4-bit weights, equal nodes merged, the opset."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    ShapeInferencePass,
)

from ..state_io import Interface
from .translations import INT4_DOMAIN


def tidy(model: ir.Model, interface: Interface, opset: int) -> None:
    """Finish a translated model, in place.

    Args:
        model: Of opset 23, as torch.onnx made it.
        interface: Names of its inputs and outputs, in order.
        opset: 23 or 24.
    """
    _name(model.graph, interface)
    resolve(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    _forget_sources(model)
    for part in (model, *model.functions.values()):
        part.opset_imports[""] = opset
    model.ir_version = max(model.ir_version, 11 if opset == 24 else 10)
    # onnx's propagation of values takes matrices for vectors (seen on 1.23 with [B, 1] + [N]).
    ShapeInferencePass(data_prop=False)(model)
    RemoveUnusedOpsetsPass()(model)


def _name(graph: ir.Graph, interface: Interface) -> None:
    for value, name in zip(graph.inputs, interface.input_names, strict=True):
        value.name = name
    for place, name in enumerate(interface.output_names):
        value = graph.outputs[place]
        # One value may be two outputs, or an input: each output needs a node and a name of its own.
        if value.is_graph_input() or value in list(graph.outputs)[:place] or value.producer() is None:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[place] = value = copy.outputs[0]
        value.name = name


def resolve(model: ir.Model) -> None:
    """Packed bytes become 4-bit initializers, and the marked nodes standard ones."""
    graph = model.graph
    for node in list(graph):
        if node.domain != INT4_DOMAIN:
            continue
        packed, *scale = node.inputs
        assert packed is not None
        assert packed.const_value is not None
        k, n = (node.attributes[name].as_int() for name in ("k", "n"))
        name = f"{packed.name}.int4"
        if name in graph.initializers:
            weight = graph.initializers[name]
        else:
            tensor = ir.PackedTensor(packed.const_value.numpy(), ir.DataType.INT4, shape=ir.Shape((k, n)), name=name)
            weight = ir.Value(
                name=name, type=ir.TensorType(ir.DataType.INT4), shape=ir.Shape((k, n)), const_value=tensor
            )
            graph.register_initializer(weight)
        by = scale[0] if scale else None
        if by is not None:
            assert by.shape is not None
            block = k // by.shape.numpy()[0]
            new = ir.node("DequantizeLinear", [weight, by], {"axis": 0, "block_size": block})
        else:
            new = ir.node("Cast", [weight], {"to": ir.DataType.INT8})
        old = node.outputs[0]
        new.outputs[0].name, new.outputs[0].shape = old.name, ir.Shape((k, n))
        kind = ir.DataType.INT8 if by is None else by.dtype
        assert kind is not None
        new.outputs[0].type = ir.TensorType(kind)
        graph.insert_before(node, new)
        old.replace_all_uses_with(new.outputs[0])
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _forget_sources(model: ir.Model) -> None:
    """Drop torch.onnx's notes on each node: they hold the paths of the machine's files, and outweigh the graph."""
    for node in (node for part in (model.graph, *model.functions.values()) for node in part.all_nodes()):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def written_in_place(model: ir.Model, interface: Interface) -> list[str]:
    """State whose output may lie where its input lies: nothing but the write itself reads the input."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    found = []
    for place, name in enumerate(interface.state, len(interface.outputs)):
        past, present = inputs[f"past.{name}"], graph.outputs[place].producer()
        writes = present is not None and present.op_type in _WRITES and present.inputs[0] is past
        if writes and len(past.uses()) == 1:
            found.append(name)
    return found


_WRITES = ("ScatterElements", "ScatterND", "TensorScatter")
