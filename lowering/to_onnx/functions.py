"""Operators as nodes of graphwright's own domain, each with a function of the model for a body.

    y = graphwright::int8_linear(x, weight, scale, bias)        tensors are inputs, numbers and texts are attributes

Any runtime runs the body, which is the operator's portable form; one that knows the operator can replace the node.
Calls that differ in attributes, dtypes or sizes have bodies of their own, told apart by the overload of the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from ...patterns.nodes import arguments
from ..apply import Keep
from ..registry import Choice, Lowering, choose, name_of

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "graphwright"
_ATTRIBUTES = {"int": "INT", "SymInt": "INT", "bool": "INT", "float": "FLOAT", "str": "STRING"}


def as_functions(nodes: Iterable[Node]) -> list[Choice]:
    """Choices that keep calls as nodes, where a node can say everything about them; portable ones where not."""
    made = []
    for call in nodes:
        if name_of(call) is None:
            continue
        body = choose(call, "onnx", "function")
        reason = _constant_arguments(call) if body.lowering is not None else f"it has no body: {body.reason}"
        if body.lowering is None or reason is not None:
            portable = choose(call, "onnx", "portable")
            passed = ((f"{DOMAIN}::{body.operator}", reason or ""), *portable.passed_over)
            made.append(replace(portable, passed_over=passed))
        else:
            becomes = f"{DOMAIN}::{body.operator}, its body: {body.lowering.becomes}"
            made.append(replace(body, lowering=Lowering(body.operator, "onnx", becomes, Keep())))
    return made


def _constant_arguments(node: Node) -> str | None:
    """Why a call cannot be a node: attributes are constants."""
    for name, value in arguments(node).items():
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(part, Node) and not isinstance(part.meta.get("val"), Tensor) for part in parts):
            return f"its {name} is known when it runs only"
    return None


def function_translations(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """Translations of the calls that were kept, for torch.onnx."""
    kept = {node.target for node in program.graph.nodes if name_of(node) is not None}
    return {overload: _translation(overload) for overload in kept}


def attach(model: ir.Model, program: ExportedProgram, lower: Callable[[ExportedProgram], ir.Model]) -> None:
    """Give every node of the domain its function.

    Args:
        model: As translated from `program`; nothing has been merged or moved in it yet.
        program: With the calls.
        lower: Lowers a program of one call to a portable model.
    """
    calls = [node for node in program.graph.nodes if name_of(node) is not None]
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    assert [name_of(call) for call in calls] == [node.op_type for node in nodes]
    overloads: dict[str, dict[str, str]] = {}
    for call, node in zip(calls, nodes, strict=True):
        known = overloads.setdefault(node.op_type, {})
        key = _key(call)
        if key not in known:
            known[key] = f"v{len(known)}"
            function = _function(call, node, known[key], lower(_program_of(call)))
            model.functions[function.identifier()] = function
        node.overload = known[key]
    if nodes:
        model.opset_imports[DOMAIN] = 1


def _translation(overload: Any) -> Callable[..., Any]:
    import onnx
    from onnxscript import values

    schema = overload._schema
    tensors = [argument for argument in schema.arguments if _is_tensor(argument)]
    others = [argument for argument in schema.arguments if not _is_tensor(argument)]
    formal, kind = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption
    types = sorted(onnx.defs.get_schema("Identity", 21).type_constraints[0].allowed_type_strs)
    letters = [f"T{place}" for place in range(len(tensors) + len(schema.returns))]
    declared = onnx.defs.OpSchema(
        schema.name.split("::")[1],
        DOMAIN,
        1,
        inputs=[
            formal(
                argument.name,
                letter,
                param_option=kind.Optional
                if "?" in str(argument.type) or str(argument.type).startswith("Optional")
                else kind.Single,
            )
            for argument, letter in zip(tensors, letters, strict=False)
        ],
        outputs=[formal(f"y{place}", letter) for place, letter in enumerate(letters[len(tensors) :])],
        type_constraints=[(letter, types, "") for letter in letters],
        attributes=[
            onnx.defs.OpSchema.Attribute(argument.name, _attribute_type(argument), "", required=False)
            for argument in others
        ],
    )
    node = values.Op(values.Opset(DOMAIN, 1), schema.name.split("::")[1], declared)

    def translate(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        inputs = [given.get(argument.name) for argument in tensors]
        attributes = {
            argument.name: value
            for argument in others
            if (value := given.get(argument.name, argument.default_value)) is not None
        }
        return node(*inputs, **attributes)

    return translate


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _attribute_type(argument: Any) -> Any:
    import onnx

    text = str(argument.type).removeprefix("Optional[").removesuffix("]")
    plural = text.startswith("List[")
    name = _ATTRIBUTES[text.removeprefix("List[").removesuffix("]")]
    return getattr(onnx.defs.OpSchema.AttrType, name + ("S" if plural else ""))


def _key(call: Node) -> str:
    """What a body depends on."""

    def told(value: Any) -> str:
        if not isinstance(value, Node):
            return repr(value)
        fake = value.meta["val"]
        return f"{fake.dtype}{[size if isinstance(size, int) else '?' for size in fake.shape]}"

    return str({name: told(value) for name, value in arguments(call).items()})


class _Call(nn.Module):
    """One call with its constants."""

    def __init__(self, target: Any, constants: dict[str, Any], tensors: list[str]) -> None:
        super().__init__()
        self.target, self.constants, self.tensors = target, constants, tensors

    def forward(self, *tensors: Tensor) -> Any:
        return self.target(**self.constants, **dict(zip(self.tensors, tensors, strict=True)))


def _program_of(call: Node) -> ExportedProgram:
    """The call alone, its tensors inputs, with the sizes dynamic that are so."""
    given = arguments(call)
    tensors = {name: value.meta["val"] for name, value in given.items() if isinstance(value, Node)}
    constants = {name: value for name, value in given.items() if name not in tensors}
    examples = tuple(
        torch.zeros([size if isinstance(size, int) else int(size.node.hint) for size in fake.shape], dtype=fake.dtype)
        for fake in tensors.values()
    )
    dynamic = tuple(
        {place: Dim.AUTO for place, size in enumerate(fake.shape) if not isinstance(size, int)}
        for fake in tensors.values()
    )
    module = _Call(call.target, constants, list(tensors)).eval()
    return torch.export.export(module, examples, dynamic_shapes={"tensors": dynamic}, strict=False)


def _function(call: Node, node: ir.Node, overload: str, model: ir.Model) -> ir.Function:
    """A model as the body of a node."""
    import onnx_ir as ir

    graph = model.graph
    given = arguments(call)
    named = [name for name, argument in zip(given, call.target._schema.arguments, strict=True) if _is_tensor(argument)]  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    taken = iter(list(graph.inputs))
    inputs = [next(taken) if isinstance(given[name], Node) else ir.Value(name=name) for name in named]
    for value, name in zip(inputs, named, strict=True):
        value.name = name
    graph.inputs.clear()
    graph.inputs.extend(inputs[: len(node.inputs)])
    for name, value in list(graph.initializers.items()):
        constant = ir.node("Constant", [], {"value": value.const_value})
        constant.outputs[0].name = name
        del graph.initializers[name]
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
    graph.opset_imports.update(model.opset_imports)
    return ir.Function(DOMAIN, node.op_type, overload, graph=graph, attributes=[])
