"""What a graph's nodes say about their values, as JSON: symbolic sizes and fake tensors.

An expression is an integer, a float, a truth value, a symbol's name, or a list of a function's name and its arguments,
so ``["Add", "s27", 1]`` is ``s27 + 1``. A file's text is never evaluated: reading looks the name up in a closed table
of functions, and bounds what sympy may compute (a short text such as ``9**9**9`` would otherwise fill the memory).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from ..errors import InvalidFile
from ..torch_private import (
    FakeTensor,
    FakeTensorMode,
    ShapeEnv,
    ValueRanges,
    define_symbol,
    int_oo,
    new_fake_mode,
    symbol_facts,
    sympy_functions,
)

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class SymbolWriter:
    """Writes expressions and values, and gathers the symbols that they mention in ``table``."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, Any]] = {}

    def expression(self, expression: sympy.Basic, env: ShapeEnv | None) -> Any:
        """A sympy expression; ``env`` knows the hints and ranges of its symbols."""
        if isinstance(expression, sympy.Symbol):
            self._define(expression, env)
            return expression.name
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Float):
            return float(expression)
        if isinstance(expression, sympy.logic.boolalg.BooleanAtom):
            return bool(expression)
        if isinstance(expression, sympy.Rational):
            return ["Rational", int(expression.p), int(expression.q)]
        name = _FUNCTION_NAMES.get(type(expression))
        if name is None or (name in _POWERS and not expression.args[1].is_number):
            raise InvalidFile(f"the size {expression} uses {type(expression).__name__}, which cannot be stored")
        return [name, *(self.expression(argument, env) for argument in expression.args)]

    def value(self, value: object) -> Any:
        """What ``meta["val"]`` holds: a tensor's dtype, sizes, strides and device, a scalar, or a sequence of these."""
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                raise InvalidFile(f"a value of layout {value.layout} cannot be stored")
            sizes, strides = ([self._size(size) for size in sequence] for sequence in (value.shape, value.stride()))
            dtype = str(value.dtype).removeprefix("torch.")
            return {"tensor": [dtype, sizes, strides, str(value.device), value.requires_grad]}
        for name, kind in _SYMBOLIC_SCALARS.items():
            if isinstance(value, kind):
                return {name: self._scalar(value)}
        if value is None or isinstance(value, bool | int | str):
            return {"constant": read_constant(value)}
        if isinstance(value, float):
            return {"constant": write_float(value)}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [self.value(item) for item in value]}
        raise InvalidFile(f"a value of type {type(value).__name__} cannot be stored")

    def bound(self, bound: Any) -> int | float | None:
        """One end of a range; none is infinite."""
        if bound in _INFINITIES:
            return None
        return int(bound) if isinstance(bound, sympy.Integer) else float(bound)

    def _size(self, size: int | torch.SymInt) -> Any:
        return self._scalar(size) if isinstance(size, torch.SymInt) else int(size)

    def _scalar(self, value: Any) -> Any:
        node = value.node
        constant = node.constant if node.constant is not None else node.maybe_as_int()
        return constant if constant is not None else self.expression(node.expr, node.shape_env)

    def _define(self, symbol: sympy.Symbol, env: ShapeEnv | None) -> None:
        if symbol.name in self.table:
            return
        facts = symbol_facts(env, symbol) if env is not None else None
        hint, interval, size_like = facts or (None, None, False)
        self.table[symbol.name] = {
            "assume": [name for name in _ASSUMPTIONS if getattr(symbol, f"is_{name}")],
            "hint": None if hint is None else self.bound(hint),
            "range": None if interval is None else [self.bound(interval.lower), self.bound(interval.upper)],
            "size_like": size_like,
        }


class SymbolReader:
    """Rebuilds expressions and values in a fresh environment; everything in ``table`` is checked first."""

    def __init__(self, table: Mapping[str, Mapping[str, Any]]) -> None:
        self.mode: FakeTensorMode = new_fake_mode()
        env = self.mode.shape_env
        assert env is not None  # new_fake_mode makes one
        self._env: ShapeEnv = env
        self._symbols: dict[str, sympy.Symbol] = {}
        self._hints: dict[sympy.Symbol, sympy.Basic] = {}
        self._scalars: dict[tuple[str, str], Any] = {}
        for name, facts in table.items():
            self._define(name, facts)

    def symbol(self, name: str) -> sympy.Symbol:
        """The symbol of that name."""
        if name not in self._symbols:
            raise InvalidFile(f"unknown symbol {name!r}")
        return self._symbols[name]

    def expression(self, data: Any) -> sympy.Basic:
        """The expression that ``SymbolWriter.expression`` wrote."""
        return self._expression(data, [_MAX_TERMS])

    def value(self, data: Any) -> Any:
        """The value that ``SymbolWriter.value`` wrote. Its tensors are fake: nothing is allocated.

        To be called inside ``with reader.mode``: entering it once for a graph costs less than once a tensor.
        """
        ((kind, content),) = data.items()
        if kind == "tensor":
            return self._tensor(*content)
        if kind in _SYMBOLIC_SCALARS:
            return self._scalar(kind, content)
        if kind == "constant":
            return read_constant(content)
        if kind in ("list", "tuple"):
            items = [self.value(item) for item in content]
            return items if kind == "list" else tuple(items)
        raise InvalidFile(f"unknown kind of value {kind!r}")

    def range(self, lower: float | None, upper: float | None, *, integer: bool = True) -> ValueRanges[Any]:
        """The interval that two ends from ``SymbolWriter.bound`` describe."""
        infinity = int_oo if integer else sympy.oo
        return ValueRanges(
            -infinity if lower is None else sympy.sympify(_number(lower)),
            infinity if upper is None else sympy.sympify(_number(upper)),
        )

    def _define(self, name: str, facts: Mapping[str, Any]) -> None:
        if not _SYMBOL.fullmatch(name):
            raise InvalidFile(f"{name!r} is not the name of a symbol")
        assume = list(facts["assume"])
        if not set(assume) <= set(_ASSUMPTIONS):
            raise InvalidFile(f"unknown assumption about {name}: {assume}")
        symbol = self._symbols[name] = sympy.Symbol(name, **dict.fromkeys(assume, True))
        interval = None
        if facts["range"] is not None:
            lower, upper = facts["range"]
            interval = self.range(lower, upper, integer=bool(symbol.is_integer))
        hint = None if facts["hint"] is None else sympy.sympify(_number(facts["hint"]))
        if hint is not None:
            self._hints[symbol] = hint
        define_symbol(self._env, symbol, hint=hint, interval=interval, size_like=bool(facts["size_like"]))

    def _expression(self, data: Any, budget: list[int]) -> sympy.Basic:
        budget[0] -= 1
        if budget[0] < 0:
            raise InvalidFile(f"an expression has more than {_MAX_TERMS} terms")
        if isinstance(data, str):
            return self.symbol(data)
        if isinstance(data, bool):
            return sympy.true if data else sympy.false
        if isinstance(data, int | float):
            return sympy.sympify(_number(data))
        name, *arguments = data
        if name == "Rational":
            numerator, denominator = arguments
            return sympy.Rational(int(_number(numerator)), int(_number(denominator)))
        function = _FUNCTIONS.get(name) if isinstance(name, str) else None
        if function is None:
            raise InvalidFile(f"unknown function {name!r} in an expression")
        terms = [self._expression(argument, budget) for argument in arguments]
        if name in _POWERS and not (terms[1].is_number and abs(float(terms[1])) <= _MAX_EXPONENT):  # type: ignore[arg-type]
            raise InvalidFile(f"the exponent {terms[1]} is not a number up to {_MAX_EXPONENT}")
        result = function(*terms)
        if result.has(sympy.nan, sympy.zoo) or (isinstance(result, sympy.Integer) and abs(int(result)) > _MAX_INTEGER):
            raise InvalidFile(f"{name} in an expression has no value of 64 bits")
        return result

    def _scalar(self, kind: str, data: Any) -> Any:
        if not isinstance(data, str | list):
            return data if isinstance(data, bool) else _number(data)
        key = (kind, repr(data))
        if key not in self._scalars:
            expression = self.expression(data)
            known = expression.free_symbols <= self._hints.keys()
            hint: Any = expression.xreplace(self._hints) if known else None
            if kind == "sym_int":
                made = self._env.create_symintnode(expression, hint=None if hint is None else int(hint))  # type: ignore[arg-type]
            elif kind == "sym_float":
                made = self._env.create_symfloatnode(expression, hint=None if hint is None else float(hint))  # type: ignore[arg-type]
            else:
                made = self._env.create_symboolnode(expression)  # type: ignore[arg-type]
            self._scalars[key] = made
        return self._scalars[key]

    def _tensor(self, dtype: str, sizes: list[Any], strides: list[Any], device: str, requires_grad: bool) -> FakeTensor:
        shape = [self._scalar("sym_int", size) for size in sizes]
        steps = [self._scalar("sym_int", stride) for stride in strides]
        fake = torch.empty_strided(
            shape, steps, dtype=read_dtype(dtype), device=read_device(device), requires_grad=requires_grad is True
        )
        if not isinstance(fake, FakeTensor):
            raise RuntimeError("values are read inside `with reader.mode`")
        return fake


def write_float(value: float) -> Any:
    """A float as JSON, which has no infinities and no NaN."""
    return value if math.isfinite(value) else {"float": str(value)}


def read_float(data: Mapping[str, str]) -> float:
    """The float that ``write_float`` wrote as a mapping."""
    values = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
    if data.keys() != {"float"} or data["float"] not in values:
        raise InvalidFile(f"{data!r} is not a number")
    return values[data["float"]]


def read_constant(data: Any) -> Any:
    """A constant input or value: none, a truth value, a number, or a short text without quotes.

    Torch writes a constant input's text between quotes into the guard code that it compiles for a module.
    """
    if isinstance(data, dict):
        return read_float(data)
    if isinstance(data, str) and not _CONSTANT_TEXT.fullmatch(data):
        raise InvalidFile(f"the constant {data!r} holds quotes, backslashes or control characters, or is too long")
    if not (data is None or isinstance(data, bool | int | float | str)):
        raise InvalidFile(f"{data!r} is not a constant")
    return data


def read_text(data: object) -> str:
    """A text that reaches no code: a stack trace, a module's name, an argument that is a string."""
    if not isinstance(data, str):
        raise InvalidFile(f"{data!r} is not text")
    return data


def read_dtype(name: str) -> torch.dtype:
    """The dtype of that name, without ``torch.``."""
    if name not in DTYPES:
        raise InvalidFile(f"unknown dtype {name!r}")
    return DTYPES[name]


def read_device(name: str) -> torch.device:
    """The device of that name; whether this machine has it is not asked."""
    if not isinstance(name, str) or not _DEVICE.fullmatch(name):
        raise InvalidFile(f"{name!r} is not a device")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidFile(f"unknown device {name!r}") from error


def _number(data: object) -> int | float:
    if isinstance(data, bool) or not isinstance(data, int | float) or not abs(data) <= _MAX_INTEGER:
        raise InvalidFile(f"{data!r} is not a number of 64 bits")
    return data


_MAX_TERMS = 2000
_MAX_INTEGER = 2**63
_MAX_EXPONENT = 64
# The prefixes of torch.utils._sympy.symbol: sizes, unbacked integers, backed and unbacked floats.
_SYMBOL = re.compile(r"(s|u|zf|zuf)[0-9]{1,9}", re.ASCII)
_DEVICE = re.compile(r"[a-z]{2,16}(:[0-9]{1,3})?", re.ASCII)
_CONSTANT_TEXT = re.compile(r"[^'\"\\\x00-\x1f\x7f-\x9f\u2028\u2029]{0,4096}")
_ASSUMPTIONS = ("integer", "real", "positive", "nonnegative")
_SYMBOLIC_SCALARS = {"sym_int": torch.SymInt, "sym_float": torch.SymFloat, "sym_bool": torch.SymBool}
_INFINITIES = (sympy.oo, -sympy.oo, int_oo, -int_oo)
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift", "RShift")
_FUNCTIONS: dict[str, Any] = {
    "Add": sympy.Add,
    "Mul": sympy.Mul,
    "Pow": sympy.Pow,
    "And": sympy.And,
    "Or": sympy.Or,
    "Not": sympy.Not,
    "Eq": sympy.Eq,
    "Ne": sympy.Ne,
    "Lt": sympy.Lt,
    "Le": sympy.Le,
    "Gt": sympy.Gt,
    "Ge": sympy.Ge,
} | {
    name: getattr(sympy_functions, name)
    for name in (
        *("FloorDiv", "CleanDiv", "CeilDiv", "Mod", "PythonMod", "ModularIndexing", "Where", "Max", "Min"),
        *("CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "TruncToFloat", "ToFloat", "RoundDecimal"),
        *("IntTrueDiv", "FloatTrueDiv", "PowByNatural", "FloatPow", "LShift", "RShift", "Identity"),
        *("IsNonOverlappingAndDenseIndicator", "OpaqueUnaryFn_sqrt"),
    )
    if hasattr(sympy_functions, name)
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
