"""The call's side of a phase: checks arguments against what was captured, and folds and unfolds their structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .errors import InvalidArgument, InvalidType
from .patterns.graph import GraphView
from .patterns.nodes import free_symbols
from .torch_private import pytree


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; which are missing is not looked at, see `require_all`.

    Raises:
        InvalidType: Too many, one twice, or a name that there is not.
    """
    known = f"the inputs are {', '.join(names)}"
    if len(args) > len(names):
        raise InvalidType(f"takes {len(names)} inputs ({', '.join(names)}), got {len(args)}")
    bound = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in bound:
            raise InvalidType(f"got two values for {name!r}")
        if name not in names:
            raise InvalidType(f"there is no input {name!r}; {known}")
        bound[name] = value
    return bound


def require_all(
    bound: dict[str, Any], names: Sequence[str], facts: Mapping[str, Any], device: torch.device | str = "cpu"
) -> None:
    """Add what may be left out: without `starts` no sequence of a language model is padded.

    Raises:
        InvalidType: An input is missing.
    """
    if "starts" in names and "max_cache_len" in facts and "starts" not in bound:
        bound["starts"] = torch.zeros(facts["batch_size"], dtype=torch.int64, device=device)
    missing = [name for name in names if name not in bound]
    if missing:
        raise InvalidType(f"missing input {missing[0]!r}; the inputs are {', '.join(names)}")


def check_cache_inputs(bound: Mapping[str, Any], length: int) -> None:
    """Refuse positions and starts that a cache of some length does not hold; tensors on a GPU are not read.

    Raises:
        InvalidArgument: They lie outside, or positions are not consecutive.
    """
    positions, starts = bound.get("cache_position"), bound.get("starts")
    if isinstance(positions, Tensor) and positions.device.type == "cpu" and len(positions):
        first, last, count = int(positions[0]), int(positions[-1]), positions.shape[0]
        if last - first != count - 1 or (count > 2 and not bool((positions.diff() == 1).all())):
            raise InvalidArgument(f"cache_position must be consecutive, got {first} to {last} for {count} tokens")
        if first < 0 or last >= length:
            raise InvalidArgument(f"positions {first} to {last} do not fit the captured cache of {length}")
    if not isinstance(starts, Tensor) or starts.device.type != "cpu":
        return
    if any(not 0 <= start < length for start in starts.tolist()):
        raise InvalidArgument(f"starts {starts.tolist()} do not lie in the captured cache of {length} positions")


class CallSignature:
    """What one phase takes and returns.

    Args:
        exported: The phase's program.
        names: Names of the top-level arguments.
        cache_length: Positions that the captured cache holds, for language models.
    """

    def __init__(self, exported: ExportedProgram, names: Sequence[str], cache_length: int | None = None) -> None:
        view = GraphView(exported)
        self._names = tuple(names)
        self._inputs = [
            node for node in exported.graph.find_nodes(op="placeholder", sort=True) if _is_argument(view, node)
        ]
        self._values = [node.meta.get("val") for node in self._inputs]
        self._ranges = exported.range_constraints
        self._cache_length = cache_length
        self._out = exported.call_spec.out_spec

    def flatten(self, bound: Mapping[str, Any]) -> list[Any]:
        """The arguments as the graph takes them.

        Raises:
            InvalidType: Names the input, what it is and what it should be.
            InvalidArgument: A position or a start lies outside the captured cache.
        """
        flat = pytree.tree_leaves([bound[name] for name in self._names])
        if len(flat) != len(self._values):
            raise InvalidType(f"the inputs hold {len(flat)} tensors and values, the captured ones {len(self._values)}")
        sizes: dict[Any, int] = {}
        for node, expected, value in zip(self._inputs, self._values, flat, strict=True):
            self._check(node.name, expected, value, sizes)
        if self._cache_length is not None and "cache_position" in bound:
            check_cache_inputs(bound, self._cache_length)
        return flat

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The graph's outputs in the model's structure."""
        return pytree.tree_unflatten(list(outputs), self._out) if self._out is not None else tuple(outputs)

    def _check(self, name: str, expected: Any, value: Any, sizes: dict[Any, int]) -> None:
        if not isinstance(expected, Tensor):
            captured = expected
            if isinstance(value, Tensor) or (not free_symbols(captured) and value != captured):
                raise InvalidType(f"{name} was captured as the constant {captured!r}, got {value!r}")
            return
        wanted = f"{str(expected.dtype).removeprefix('torch.')}[{', '.join(map(str, expected.shape))}]"
        if not isinstance(value, Tensor):
            raise InvalidType(f"{name} must be a tensor {wanted}, got {type(value).__name__}")
        got = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if value.dtype != expected.dtype or value.dim() != expected.dim():
            raise InvalidType(f"{name} must be {wanted}, got {got}")
        for dim, (size, actual) in enumerate(zip(expected.shape, value.shape, strict=True)):
            if isinstance(size, int):
                if size != actual:
                    raise InvalidType(f"{name} must be {wanted}, got {got}: dimension {dim} is fixed")
            elif isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                self._check_symbol(name, dim, size.node.expr, int(actual), sizes)

    def _check_symbol(self, name: str, dim: int, symbol: Any, actual: int, sizes: dict[Any, int]) -> None:
        if sizes.setdefault(symbol, actual) != actual:
            raise InvalidType(f"dimension {dim} of {name} is {actual}, another input says {sizes[symbol]}")
        limits = self._ranges.get(symbol)
        if limits is not None and not limits.lower <= actual <= limits.upper:
            raise InvalidType(f"dimension {dim} of {name} is {actual}, captured for {limits.lower} to {limits.upper}")


def _is_argument(view: GraphView, node: torch.fx.Node) -> bool:
    return view.target(node) is None
