"""State as inputs and outputs: what a program without memory of its own takes and gives back.

    buffer `key_cache_0`, written        becomes        input `past.key_cache_0`, output `present.key_cache_0`

The inputs follow the user's, the outputs too. An input that the model writes is returned in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, Node

from ..errors import UnsupportedLowering
from ..torch_private import pytree


@dataclass(frozen=True)
class Interface:
    """What a stateless program takes and gives, by name and in order.

    Attributes:
        inputs: The user's inputs.
        leaves: Which of the flat arguments they are; the others were captured as constants.
        outputs: The user's outputs.
        state: State by its qualified name -> the tensor that it starts from.
    """

    inputs: tuple[str, ...]
    leaves: tuple[int, ...]
    outputs: tuple[str, ...]
    state: dict[str, Tensor]

    @property
    def input_names(self) -> list[str]:
        """Names of all inputs of the lowered program."""
        return [*self.inputs, *(f"past.{name}" for name in self.state)]

    @property
    def output_names(self) -> list[str]:
        """Names of all its outputs."""
        return [*self.outputs, *(f"present.{name}" for name in self.state)]


def without_state(exported: ExportedProgram) -> tuple[ExportedProgram, Interface]:
    """A program whose state is passed in and out.

    Args:
        exported: A functional program; it is not changed, and shares its weights with the result.

    Raises:
        UnsupportedLowering: An input is a number.

    Returns:
        The program, flat: its inputs and outputs are lists of tensors. And what they are.
    """
    signature = exported.graph_signature
    returned = exported.graph.output_node().args[0]
    assert isinstance(returned, list | tuple)
    pairs = list(zip(returned, signature.output_specs, strict=True))
    users = [value for value, spec in pairs if spec.kind is OutputKind.USER_OUTPUT]
    # An input that the model writes is one of the caller's tensors, which a program without memory only gives back.
    users += [value for value, spec in pairs if spec.kind is OutputKind.USER_INPUT_MUTATION]
    written = {spec.target: value for value, spec in pairs if spec.kind is OutputKind.BUFFER_MUTATION}

    weights, arguments, state = [], [], {}
    for spec in signature.input_specs:
        if spec.target in written:
            state[spec.target] = spec
        else:
            (arguments if spec.kind is InputKind.USER_INPUT else weights).append(spec)
    graph, mapping = Graph(), dict[Node, Any]()
    placeholders = {node.name: node for node in exported.graph.find_nodes(op="placeholder", sort=True)}
    leaves = tuple(place for place, spec in enumerate(arguments) if isinstance(spec.arg, TensorArgument))
    for spec in arguments:
        if isinstance(spec.arg, SymIntArgument):
            raise UnsupportedLowering(f"input {spec.arg.name} is a number that is known when the program runs only")
        if isinstance(spec.arg, ConstantArgument) and spec.arg.name in placeholders:
            mapping[placeholders.pop(spec.arg.name)] = spec.arg.value
    arguments = [arguments[place] for place in leaves]
    calls = [node for node in exported.graph.nodes if node.op in ("call_function", "get_attr")]
    for node in (*(placeholders[spec.arg.name] for spec in (*weights, *arguments, *state.values())), *calls):
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
        # A graph renames what is called like a Python builtin (`input`); the signature knows it by its old name.
        mapping[node].name = node.name
    values = (*users, *(written[name] for name in state))
    graph.output(tuple(mapping[value] if isinstance(value, Node) else value for value in values))
    taken = tuple(range(len(arguments) + len(state)))
    flat = ModuleCallSignature(
        [], [], pytree.tree_structure((taken, {})), pytree.tree_structure(tuple(range(len(values))))
    )
    program = ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(
            [*weights, *arguments, *(InputSpec(InputKind.USER_INPUT, spec.arg, None) for spec in state.values())],
            [OutputSpec(OutputKind.USER_OUTPUT, _argument(value), None) for value in values],
        ),
        state_dict={name: tensor for name, tensor in exported.state_dict.items() if name not in state},
        range_constraints=dict(exported.range_constraints),
        module_call_graph=[ModuleCallEntry("", flat)],
        constants=dict(exported.constants),
        verifiers=exported.verifiers,
    )
    inputs = tuple(spec.arg.name for spec in arguments)
    outputs = tuple(f"output_{position}" if len(users) > 1 else "output" for position in range(len(users)))
    return program, Interface(inputs, leaves, outputs, {name: exported.state_dict[name] for name in state})


def _argument(value: object) -> TensorArgument | SymIntArgument | ConstantArgument:
    if not isinstance(value, Node):
        return ConstantArgument(name="", value=value)  # pyright: ignore[reportArgumentType] (a number or None)
    kind = TensorArgument if isinstance(value.meta.get("val"), Tensor) else SymIntArgument
    return kind(name=value.name)
