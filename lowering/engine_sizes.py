"""Optimization profiles: for each dynamic size the least, the usual and the largest that an engine is built for.

They are the captured range and the example's size; the caller narrows them, or says what capture left open:

    sizes={"input_ids": {1: (1, 16, 512)}}        input -> dimension -> (least, usual, largest)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import InvalidArgument, UnsupportedLowering
from ..torch_private import symbol_facts

Sizes = Mapping[str, Mapping[int, Sequence[int]]]
Profile = dict[str, list[tuple[int, ...]]]
"""Input -> its least, usual and largest shape; inputs of fixed sizes are left out."""


def check_sizes(programs: Sequence[ExportedProgram], sizes: Sizes) -> None:
    """Refuse sizes that no phase can have.

    Raises:
        InvalidArgument: What was got and what there is.
    """
    shapes = [_shapes(exported) for exported in programs]
    known = list(dict.fromkeys(name for found in shapes for name in found))
    for name, dimension, given in _each(sizes):
        if name not in known:
            raise InvalidArgument(f"sizes: there is no input {name!r}; there are {', '.join(known)}")
        found = [found[name][dimension] for found in shapes if 0 <= dimension < len(found.get(name, ()))]
        if all(isinstance(size, int) for size in found):
            raise InvalidArgument(f"sizes: {name}[{dimension}] is not dynamic in any phase")
        if len(given) != 3 or not 0 < given[0] <= given[1] <= given[2]:
            raise InvalidArgument(f"sizes: {name}[{dimension}] must be (least, usual, largest), got {tuple(given)}")


def profile(exported: ExportedProgram, sizes: Sizes) -> Profile:
    """The shapes that an engine of a phase is built for.

    Args:
        exported: The phase.
        sizes: The caller's, checked.

    Raises:
        InvalidArgument: Sizes outside of what was captured.
        UnsupportedLowering: A size without a largest value, by input and dimension.
    """
    shapes = _shapes(exported)
    asked: dict[sympy.Symbol, Sequence[int]] = {}
    for name, dimension, given in _each(sizes):
        size = shapes[name][dimension] if name in shapes else 0
        if isinstance(size, int):
            continue  # Another phase's.
        symbol = _expression(size)
        if not isinstance(symbol, sympy.Symbol):
            raise InvalidArgument(f"sizes: {name}[{dimension}] is {symbol}; give the size of {symbol.free_symbols}")
        least, largest = _captured(exported, size, symbol)
        if given[0] < least or (largest is not None and given[2] > largest):
            raise InvalidArgument(f"sizes: {name}[{dimension}] was captured for {least} to {largest}, got {given}")
        asked[symbol] = given
    made: Profile = {}
    for name, shape in shapes.items():
        if all(isinstance(size, int) for size in shape):
            continue
        triples = [_triple(exported, size, asked, f"{name}[{place}]") for place, size in enumerate(shape)]
        made[name] = list(zip(*triples, strict=True))
    return made


def _triple(exported: ExportedProgram, size: Any, asked: Mapping[sympy.Symbol, Sequence[int]], where: str) -> list[int]:
    """Least, usual and largest value of a size, which grows with each of its symbols."""
    if isinstance(size, int):
        return [size] * 3
    ends: list[dict[sympy.Symbol, int]] = [{}, {}, {}]
    for symbol in _expression(size).free_symbols:
        given = asked.get(symbol)
        if given is None:
            least, largest = _captured(exported, size, symbol)
            if largest is None:
                hint = f"capture it with Dim(max=...), or export with sizes={{{where.split('[')[0]!r}: ...}}"
                raise UnsupportedLowering(f"{where} has no largest size: {hint}")
            usual: Any = symbol_facts(size.node.shape_env, symbol)[0]
            given = (least, min(max(int(usual or least), least), largest), largest)
        for end, value in zip(ends, given, strict=True):
            end[symbol] = value
    return [int(_expression(size).xreplace({s: sympy.Integer(v) for s, v in end.items()})) for end in ends]


def _captured(exported: ExportedProgram, size: Any, symbol: sympy.Symbol) -> tuple[int, int | None]:
    bounds: Any = exported.range_constraints.get(symbol) or symbol_facts(size.node.shape_env, symbol)[1]
    assert bounds is not None
    # An unbounded size is infinite here, or the largest integer.
    largest = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
    return max(int(bounds.lower), 1), largest


def _shapes(exported: ExportedProgram) -> dict[str, Sequence[Any]]:
    """Sizes of the user's tensors, by input."""
    fakes: dict[str, Any] = {node.name: node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")}
    users = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return {name: value.shape for name in users if isinstance(value := fakes.get(name), Tensor)}


def _expression(size: Any) -> Any:
    return size.node.expr


def _each(sizes: Sizes) -> Iterator[tuple[str, int, Sequence[int]]]:
    return ((name, dimension, given) for name, found in sizes.items() for dimension, given in found.items())
