"""What nodes call, and with what: operators and arguments as JSON.

A node's name stands for the node; every literal that JSON lacks is a mapping of one kind to its text.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import InvalidFile
from ..torch_private import OpOverload
from .symbols import read_device, read_dtype, read_float, read_text, write_float

NAMESPACES = ("aten", "prims", "graphwright")


def write_operator(target: Any) -> str:
    """The name of an operator or of a function of scalars, refused at once if it could not be read again."""
    if isinstance(target, OpOverload):
        name = f"torch.ops.{target}"
        read_operator(name)
        return name
    for name, function in _SCALAR_FUNCTIONS.items():
        if function is target:
            return name
    raise InvalidFile(f"the function {getattr(target, '__name__', target)} cannot be stored")


def read_operator(target: object) -> Callable[..., Any]:
    """The operator of that name, if it is one that torch has registered and that only computes.

    Raises:
        InvalidFile: Not a name of an operator, a foreign namespace, not registered here, or a reader of files.
    """
    if not isinstance(target, str):
        raise InvalidFile(f"{target!r} is not an operator")
    if target in _SCALAR_FUNCTIONS:
        return _SCALAR_FUNCTIONS[target]
    match = _OPERATOR.fullmatch(target)
    if match is None or match["namespace"] not in NAMESPACES:
        raise InvalidFile(f"{target!r} is not an operator of torch.ops in the namespaces {', '.join(NAMESPACES)}")
    packet = getattr(getattr(torch.ops, match["namespace"]), match["name"], None)
    overload = getattr(packet, match["overload"], None)
    if not isinstance(overload, OpOverload) or f"torch.ops.{overload}" != target:
        hint = "; import its module of graphwright.kernels" if match["namespace"] == "graphwright" else ""
        raise InvalidFile(f"the operator {target} is not registered in this process{hint}")
    if not _computes(overload):
        raise InvalidFile(f"the operator {target} does more than compute on tensors")
    return overload


def _computes(overload: OpOverload) -> bool:
    # TorchScript's `aten::save` and `aten::from_file` are reached through torch.ops too, and write or map files.
    schema = overload._schema
    values = [*schema.arguments, *schema.returns]
    reads_files = any(argument.name == "filename" for argument in schema.arguments)
    return not reads_files and (any("Tensor" in str(value.type) for value in values) or schema.name in _ASSERTIONS)


def write_argument(argument: Any) -> Any:
    """An argument of a node: a node's name, a literal, or a sequence of these."""
    if isinstance(argument, torch.fx.Node):
        return argument.name
    if argument is None or isinstance(argument, bool | int):
        return argument
    if isinstance(argument, float):
        return write_float(argument)
    if isinstance(argument, str):
        return {"text": argument}
    if isinstance(argument, list):
        return [write_argument(item) for item in argument]
    if isinstance(argument, tuple):
        return {"tuple": [write_argument(item) for item in argument]}
    if isinstance(argument, complex):
        return {"complex": [write_float(argument.real), write_float(argument.imag)]}
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    for kind, literal in _TORCH_LITERALS.items():
        if isinstance(argument, literal):
            return {kind: str(argument).removeprefix("torch.")}
    raise InvalidFile(f"an argument of type {type(argument).__name__} cannot be stored")


def read_argument(data: Any, nodes: Mapping[str, torch.fx.Node]) -> Any:
    """The argument that ``write_argument`` wrote, over the nodes read so far."""
    if isinstance(data, str):
        if data not in nodes:
            raise InvalidFile(f"the argument {data!r} is not an earlier node")
        return nodes[data]
    if data is None or isinstance(data, bool | int | float):
        return data
    if isinstance(data, list):
        return [read_argument(item, nodes) for item in data]
    ((kind, content),) = data.items()
    if kind == "tuple":
        return tuple(read_argument(item, nodes) for item in content)
    if kind not in _LITERALS:
        raise InvalidFile(f"unknown kind of argument {kind!r}")
    return _LITERALS[kind](content)


def _named(kind: str) -> Callable[[Any], Any]:
    table = {
        str(value).removeprefix("torch."): value
        for value in vars(torch).values()
        if isinstance(value, _TORCH_LITERALS[kind])
    }

    def read(name: Any) -> Any:
        if name not in table:
            raise InvalidFile(f"unknown {kind} {name!r}")
        return table[name]

    return read


def _read_complex(parts: list[Any]) -> complex:
    real, imaginary = (read_float(part) if isinstance(part, dict) else float(part) for part in parts)
    return complex(real, imaginary)


_OPERATOR = re.compile(r"torch\.ops\.(?P<namespace>[a-z]+)\.(?P<name>\w+)\.(?P<overload>\w+)", re.ASCII)
_ASSERTIONS = ("aten::_assert_scalar", "aten::sym_constrain_range", "aten::sym_constrain_range_for_size")
_SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (
            operator,
            "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ lshift rshift getitem",
        ),
        (math, "ceil floor trunc"),
        (torch, "sym_int sym_float sym_ite sym_max sym_min sym_not sym_sqrt sym_sum"),
    )
    for name in names.split()
    if hasattr(module, name)
} | {"builtins.round": round}
_TORCH_LITERALS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_LITERALS: dict[str, Callable[[Any], Any]] = {
    "text": read_text,
    "float": lambda content: read_float({"float": content}),
    "complex": _read_complex,
    "device": read_device,
    "dtype": read_dtype,
    "layout": _named("layout"),
    "memory_format": _named("memory_format"),
}
