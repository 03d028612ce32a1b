"""The sizes at which a mask is evaluated, so that holding at all of them is not luck.

Small ones are odd and even, in both orders, and the smallest that the program allows. Large ones reach past the
constants in the mask's subgraph, so that a window of 4096 is not taken for plain causality on nineteen tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
from torch import SymInt, Tensor
from torch.fx import Node

from ..torch_private import pytree
from .graph import GraphView
from .nodes import aten, concrete, dtype_of, free_symbols, is_call, shape_of

Sizes = dict[Any, int]
"""Value of each size symbol."""

LOWEST = -9e3
"""At or below, an addend removes a key: older models write -10000, which is -9984 in bfloat16."""

_ENDLESS = 1 << 30  # stands for a size without bound
_LENGTHS = (130, 1000)  # tokens at which to look for what no single constant tells of, where that is cheap
_CHEAP_BYTES = 1 << 24  # most that an evaluation allocates where others would do as well
_MOST_BYTES = 1 << 30  # most that the one evaluation past the constants allocates: a window of 4096 takes a fifth


class Unproved(Exception):
    """Nothing can be proved about a mask; the message says why."""


def sizes_to_try(
    view: GraphView, nodes: Sequence[Node], queries: SymInt | int, keys: SymInt | int, constants: Sequence[int]
) -> tuple[list[Sizes], list[Sizes]]:
    """The small sizes, and the large ones.

    Args:
        view: The graph.
        nodes: The mask's subgraph.
        queries: Number of queries.
        keys: Number of keys.
        constants: The integers in the subgraph, see `constants_of`.

    Raises:
        Unproved: The sizes that reach past the constants are more than can be evaluated.
    """
    wanted = sorted(free_symbols((queries, keys)), key=str)
    holders = {s: node for node in view.graph.nodes for s in wanted if s in free_symbols(node.meta.get("val"))}
    base = view.assignments([*nodes, *holders.values()], count=3)
    low = {symbol: _bounds(view, symbol)[0] for symbol in base[0]}
    high = {symbol: _bounds(view, symbol)[1] for symbol in base[0]}

    def cheap(candidates: Sequence[Sizes]) -> list[Sizes]:
        inside = [{s: max(low[s], min(high[s], size)) for s, size in sizes.items()} for sizes in candidates]
        distinct = [sizes for i, sizes in enumerate(inside) if sizes not in inside[:i]]
        return [sizes for sizes in distinct if _bytes(nodes, sizes) <= _CHEAP_BYTES]

    even = [{symbol: size + 1 for symbol, size in sizes.items()} for sizes in base]
    swapped = [dict(zip(sizes, reversed(sizes.values()), strict=True)) for sizes in base]
    near = cheap([*base, low, *even, *swapped])
    lengths = [*_LENGTHS, *constants, *(constant + 2 for constant in constants)]
    together = [*([symbol] for symbol in wanted), wanted]
    far = [low | dict.fromkeys(symbols, length) for length in lengths for symbols in together]
    far = [sizes for sizes in cheap(far) if sizes not in near]

    # A fixed number of keys is the length of a cache: there the queries' positions go as far as the keys do.
    sides = (queries, keys) if free_symbols(keys) else (keys,)
    most = [int(concrete(side, high)) for side in sides]
    stored = [int(size) for node in nodes if view.is_weight(node) for size in shape_of(node)]
    needed = max([sum(constant for constant in constants if constant < max(most)) + 2, *stored])

    def reaches(sizes: Sizes) -> bool:
        return all(concrete(side, sizes) >= min(needed, limit) for side, limit in zip(sides, most, strict=True))

    if any(reaches(sizes) for sizes in (*near, *far)):
        return near, far
    dear = low | {symbol: min(high[symbol], needed) for symbol in free_symbols(sides)}
    if not reaches(dear) or _bytes(nodes, dear) > _MOST_BYTES:
        raise Unproved(
            f"a proof needs an evaluation at {min(needed, max(most))} keys, more than {_MOST_BYTES >> 30} GiB"
        )
    return near, [*far, dear]


def constants_of(view: GraphView, nodes: Sequence[Node]) -> list[int]:
    """The integers that a subgraph contains, without sign: in arguments, in sizes, in one-element constants."""
    return sorted({abs(int(number)) for node in nodes for number in _numbers(view, node)})


def is_float(node: Node) -> bool:
    """Whether a node is a float tensor."""
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


def _numbers(view: GraphView, node: Node) -> Iterator[int | float]:
    found: list[Any] = list(pytree.tree_leaves((node.args, dict(node.kwargs))))
    sizes = [size for size in (*shape_of(node), node.meta.get("val")) if isinstance(size, SymInt)]
    found += [int(number) for size in sizes for number in size.node.expr.atoms(sympy.Integer)]
    stored = view.tensor(node)
    if stored is not None and stored.numel() == 1 and stored.device.type != "meta":
        found.append(stored.item())
    for number in found:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        # Beyond 31 bits there are only "to the end" of slices and the fills of masks, and no number of tokens.
        if is_number and abs(number) < 1 << 31 and number == int(number) and not (is_float(node) and number <= LOWEST):
            yield number


def _bounds(view: GraphView, symbol: Any) -> tuple[int, int]:
    limits = view.exported.range_constraints.get(symbol)
    if limits is None:
        return 1, _ENDLESS
    return int(max(limits.lower, 1)), int(min(limits.upper, _ENDLESS))


def _bytes(nodes: Sequence[Node], sizes: Mapping[Any, int]) -> int:
    """What an evaluation allocates."""
    total = 0
    for node in nodes:
        if isinstance(node.meta.get("val"), Tensor) and not is_call(node, aten.expand.default):
            elements = math.prod(int(concrete(size, sizes)) for size in shape_of(node))
            total += elements * node.meta["val"].element_size()
    return total
