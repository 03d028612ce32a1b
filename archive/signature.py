"""How an exported program is called, as JSON: its inputs and outputs, and the nested containers that they come in.

The names here reach code that torch generates for a loaded program, so each is checked to be a plain name.
"""

from __future__ import annotations

import keyword
import re
from collections import OrderedDict
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)

from ..errors import InvalidFile
from ..torch_private import pytree
from .symbols import read_constant, write_float


def identifier(name: object) -> str:
    """A name that may stand in generated code; anything else is refused."""
    if not isinstance(name, str) or not name.isidentifier() or len(name) > _MAX_NAME:
        raise InvalidFile(f"{name!r} is not a name that code may hold")
    if keyword.iskeyword(name) or name.startswith("__"):
        raise InvalidFile(f"the name {name!r} means something in code")
    return name


def qualified_name(name: object) -> str:
    """The dotted name of a parameter, buffer or constant, as ``named_parameters`` gives it."""
    if not isinstance(name, str) or len(name) > _MAX_NAME or not all(map(_PART.fullmatch, name.split("."))):
        raise InvalidFile(f"{name!r} is not the qualified name of a tensor")
    return name


def write_signature(signature: ExportGraphSignature) -> dict[str, Any]:
    """Inputs as [kind, argument, tensor's name, persistent], outputs as [kind, argument, tensor's name]."""
    return {
        "inputs": [
            [_known(spec.kind, _INPUTS).name, _write_argument(spec.arg), _target(spec.target), spec.persistent]
            for spec in signature.input_specs
        ],
        "outputs": [
            [_known(spec.kind, _OUTPUTS).name, _write_argument(spec.arg), _target(spec.target)]
            for spec in signature.output_specs
        ],
    }


def read_signature(data: dict[str, Any]) -> ExportGraphSignature:
    """The signature that ``write_signature`` wrote; whether the graph agrees is checked by ``validate``."""
    inputs = [
        InputSpec(_kind(kind, _INPUTS), _read_argument(argument), _target(target), _flag(persistent))
        for kind, argument, target, persistent in data["inputs"]
    ]
    outputs = [
        OutputSpec(_kind(kind, _OUTPUTS), _read_argument(argument), _target(target))
        for kind, argument, target in data["outputs"]
    ]
    return ExportGraphSignature(inputs, outputs)


def write_call(program: ExportedProgram) -> dict[str, Any]:
    """The containers of the arguments and of the result, the names of the arguments, and the modules' names."""
    root = program.module_call_graph[0].signature
    if root is None:
        raise InvalidFile("the program does not say how it is called")
    return {
        "arguments": _write_container(root.in_spec),
        "result": _write_container(root.out_spec),
        "names": root.forward_arg_names,
        "modules": [entry.fqn for entry in program.module_call_graph[1:]],
    }


def read_call(data: dict[str, Any]) -> tuple[pytree.TreeSpec, pytree.TreeSpec, list[str] | None, list[str]]:
    """The containers of the arguments and of the result, the arguments' names, and the modules' names."""
    arguments, result = _read_container(data["arguments"]), _read_container(data["result"])
    if arguments.type is not tuple or [child.type for child in arguments.children()] != [tuple, dict]:
        raise InvalidFile("the arguments are not a tuple and a dict of keywords")
    for name in arguments.child(1).context:
        identifier(name)
    names = None if data["names"] is None else [identifier(name) for name in data["names"]]
    modules = list(data["modules"])
    for name in modules:
        if not isinstance(name, str) or not _MODULE.fullmatch(name):
            raise InvalidFile(f"{name!r} is not the name of a module")
    return arguments, result, names, modules


def _write_argument(argument: Any) -> list[Any]:
    if isinstance(argument, ConstantArgument):
        value = read_constant(argument.value)
        return ["constant", argument.name, write_float(value) if isinstance(value, float) else value]
    for kind, cls in _ARGUMENTS.items():
        if isinstance(argument, cls):
            return [kind, argument.name]
    raise InvalidFile(f"an input or output of kind {type(argument).__name__} cannot be stored")


def _read_argument(data: list[Any]) -> Any:
    kind, name, *values = data
    if kind == "constant":
        return ConstantArgument(name="" if name == "" else identifier(name), value=read_constant(values[0]))
    if kind not in _ARGUMENTS:
        raise InvalidFile(f"unknown kind of argument {kind!r}")
    return _ARGUMENTS[kind](name=identifier(name))


def _write_container(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return None
    children = [_write_container(child) for child in spec.children()]
    for name, cls in _CONTAINERS.items():
        if spec.type is cls:
            return [name, children, *([list(spec.context)] if name in _KEYED else [])]
    if _is_output_class(spec.type):
        return ["output", children, list(spec.context), _class_name(spec.type)]
    name = spec.type.__qualname__
    raise InvalidFile(f"a {name} among the arguments or results cannot be stored; use lists, tuples and dicts")


def _read_container(data: Any) -> pytree.TreeSpec:
    if data is None:
        return pytree.treespec_leaf()
    name, children, *rest = data
    specs = [_read_container(child) for child in children]
    if name in ("list", "tuple"):
        return pytree.TreeSpec(_CONTAINERS[name], None, specs)
    keys = rest[0]
    if len(keys) != len(specs) or not all(type(key) in (str, int) for key in keys) or len(set(keys)) != len(keys):
        raise InvalidFile(f"{keys!r} are not the keys of {len(specs)} values")
    if name in _KEYED:
        return pytree.TreeSpec(_CONTAINERS[name], keys, specs)
    if name == "output":
        return pytree.TreeSpec(_output_class(rest[1]), [identifier(key) for key in keys], specs)
    raise InvalidFile(f"unknown container {name!r}")


def _is_output_class(cls: Any) -> bool:
    # The result classes of transformers and diffusers are ordered dicts whose fields are also attributes.
    return isinstance(cls, type) and issubclass(cls, OrderedDict) and cls.__module__.split(".")[0] in _OUTPUT_PACKAGES


def _output_class(name: str) -> type:
    """The result class of that name where its package has registered it in this process, else an ordered dict."""
    for cls in pytree.SUPPORTED_NODES:
        if _is_output_class(cls) and _class_name(cls) == name:
            return cls
    return OrderedDict


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _known(kind: Any, known: tuple[Any, ...]) -> Any:
    if kind not in known:
        raise InvalidFile(f"an input or output of kind {kind.name} cannot be stored")
    return kind


def _kind(name: str, known: tuple[Any, ...]) -> Any:
    for kind in known:
        if kind.name == name:
            return kind
    raise InvalidFile(f"unknown kind of input or output {name!r}")


def _target(name: object) -> str | None:
    return None if name is None else qualified_name(name)


def _flag(data: object) -> bool | None:
    if data is None or isinstance(data, bool):
        return data
    raise InvalidFile(f"{data!r} is not a truth value")


_MAX_NAME = 512
_PART = re.compile(r"(?!__)[\w\-+@:/ ]+", re.ASCII)  # keys of a ModuleDict may hold more than an identifier
_MODULE = re.compile(r"[\w\-.@]{0,512}", re.ASCII)  # a module that is called twice is listed again as name@1
_ARGUMENTS: dict[str, Any] = {
    "tensor": TensorArgument,
    "sym_int": SymIntArgument,
    "sym_float": SymFloatArgument,
    "sym_bool": SymBoolArgument,
}
_INPUTS = (InputKind.USER_INPUT, InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_OUTPUTS = (
    OutputKind.USER_OUTPUT,
    OutputKind.LOSS_OUTPUT,
    OutputKind.BUFFER_MUTATION,
    OutputKind.PARAMETER_MUTATION,
    OutputKind.USER_INPUT_MUTATION,
)
_CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple, "dict": dict, "ordered_dict": OrderedDict}
_KEYED = ("dict", "ordered_dict")
_OUTPUT_PACKAGES = ("transformers", "diffusers")
