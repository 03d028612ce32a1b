"""Evaluations of an attention mask: at which sizes, and with which values for the inputs that it reads.

Three things keep a proof by evaluation from being luck. Sizes are odd and even, in both orders, and as small as the
program allows. Inputs that a hypothesis does not use are drawn at random too, with every constant they may be compared
with. And the sizes reach past the constants in the subgraph, so that a window of 4096 is not taken for plain causality
on nineteen tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .graph import (
    CASTS,
    VIEWS,
    GraphView,
    NotEvaluable,
    aten,
    concrete,
    describe,
    dtype_of,
    free_symbols,
    is_call,
    same_size,
    shape_of,
)

_MOST_NODES = 400
_LENGTHS = (130, 1030)  # tokens at which to look for what no single constant tells of, where that is cheap
_CHEAP_BYTES = 1 << 25  # most that an evaluation allocates where others would do as well
_MOST_BYTES = 1 << 30  # most that the one evaluation past the constants allocates: a window of 4096 takes a fifth
_LOWEST = -9e3  # at or below, an addend removes a key: older models write -10000, which is -9984 in bfloat16

_LIKE = frozenset(
    {
        aten.ones_like.default,
        aten.zeros_like.default,
        aten.full_like.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
    }
)
"""Operators that read their tensor's shape and dtype only."""

_UNDEFINED = frozenset(
    {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
)

_Draw = Callable[[int, int, torch.Generator], Tensor]

_POSITIONS: tuple[tuple[str, _Draw], ...] = (
    ("positions from 0", lambda n, keys, g: torch.arange(n)),
    ("positions at the end", lambda n, keys, g: torch.arange(n) + max(keys - n, 0)),
    ("all positions last", lambda n, keys, g: torch.full((n,), keys - 1)),
    ("consecutive positions", lambda n, keys, g: torch.arange(n) + _random(max(keys - n, 0) + 1, 1, g)),
    ("random positions", lambda n, keys, g: _random(keys, n, g)),
)
_PADDING: tuple[tuple[str, _Draw], ...] = (
    ("no padding", lambda n, keys, g: torch.ones(n, dtype=torch.bool)),
    ("padding right", lambda n, keys, g: torch.arange(n) <= _random(n, 1, g)),
    ("padding left", lambda n, keys, g: torch.arange(n) >= _random(n, 1, g)),
    ("one real key", lambda n, keys, g: torch.arange(n) == _random(n, 1, g)),
    ("random padding", lambda n, keys, g: (_random(2, n, g) == 1) | (torch.arange(n) == _random(n, 1, g))),
)
"""What a draw is called, and one row of it, by its length; the n-th draws of both go together."""

_FAR_DRAWS = (1, 4)  # for large sizes: positions that reach as far as they can, and random ones


class Unproved(Exception):
    """Nothing can be proved about a mask; the message says why."""


@dataclass(frozen=True)
class Roles:
    """What a mask's inputs are taken to be; the others have to be without effect."""

    positions: Node | None
    padding: Node | None


@dataclass(frozen=True)
class Sample:
    """One evaluation of a mask.

    Attributes:
        where: Its sizes and draws, for reasons.
        queries, keys: How many.
        positions: [b, n], int64, where an input has that role.
        padding: [b, 1, keys], bool, where an input has that role.
        keep: What the mask keeps, [..., queries, keys], bool.
    """

    where: str
    queries: int
    keys: int
    positions: Tensor
    padding: Tensor | None
    keep: Tensor

    @property
    def rows(self) -> Tensor:
        """Index of each query, [1, queries, 1]."""
        return torch.arange(self.queries)[None, :, None]


class MaskSampler:
    """Evaluates one mask.

    Args:
        view: The graph.
        mask: The mask node.
        queries: Number of queries.
        keys: Number of keys.

    Attributes:
        near: Small sizes, at which most hypotheses fail.
        far: Large ones, which reach past the constants, for a hypothesis that held at the small ones.

    Raises:
        Unproved: The mask depends on what cannot be drawn, or an evaluation that a proof needs is too large.
    """

    def __init__(self, view: GraphView, mask: Node, queries: SymInt | int, keys: SymInt | int) -> None:
        self._view, self._mask, self._queries, self._keys = view, mask, queries, keys
        self._nodes = view.ancestors(mask, stop=[node for node in view.graph.nodes if is_call(node, *_LIKE)])
        self._shaped = [node for node in self._nodes if is_call(node, *_LIKE)]
        self._inputs = [node for node in self._nodes if _is_read(view, node)]
        self._refuse_what_cannot_be_drawn()
        self._constants = sorted(set(_constants(view, self._nodes)))
        self.near, self.far = self._sizes()

    def roles(self) -> Iterator[Roles]:
        """The parts that the mask's inputs could play, the fewest first."""
        positions = [None, *filter(self._may_be_positions, self._inputs)]
        padding = [None, *filter(self._may_be_padding, self._inputs)]
        for position, pad in itertools.product(positions, padding):
            if position is None or position is not pad:
                yield Roles(position, pad)

    def samples(self, roles: Roles, *, far: bool = False) -> Iterator[Sample]:
        """Evaluate the mask at each of the near or far sizes, several times where it reads inputs.

        Raises:
            Unproved: It is not a mask, or it cannot be evaluated at most of the sizes.
        """
        generator = torch.Generator().manual_seed(0)
        assignments = self.far if far else self.near
        draws = (_FAR_DRAWS if far else range(len(_POSITIONS))) if self._inputs else (0,)
        failures = 0
        for sizes, draw in itertools.product(assignments, draws):
            try:
                sample = self._sample(sizes, draw, roles, generator)
            except NotEvaluable as failure:
                raise Unproved(f"the mask depends on the value of {describe(failure.node)}") from None
            except (RuntimeError, IndexError, KeyError, TypeError, ValueError, AssertionError) as failure:
                failures += 1
                if 2 * failures >= len(assignments) * len(draws):
                    message = (str(failure).splitlines() or [type(failure).__name__])[0]
                    raise Unproved(f"the mask cannot be evaluated: {message}") from None
                continue
            yield sample

    def _refuse_what_cannot_be_drawn(self) -> None:
        if not (dtype_of(self._mask) is torch.bool or _is_float(self._mask)):
            raise Unproved(f"{describe(self._mask)} is neither bool nor float")
        for node in self._nodes:
            if node.target in _UNDEFINED or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise Unproved(f"the mask depends on a random or undefined value, {describe(node)}")
        for node in self._inputs:
            if not (self._may_be_positions(node) or self._may_be_padding(node)):
                raise Unproved(f"the mask depends on the value of {describe(node)}")
        if len(self._nodes) > _MOST_NODES:
            raise Unproved(f"the mask is computed by {len(self._nodes)} nodes; at most {_MOST_NODES} are evaluated")

    def _may_be_positions(self, node: Node) -> bool:
        shape = shape_of(node)
        is_row = not shape or same_size(shape[-1], self._queries) or same_size(shape[-1], 1)
        return dtype_of(node) in (torch.int64, torch.int32) and len(shape) <= 2 and is_row

    def _may_be_padding(self, node: Node) -> bool:
        shape = shape_of(node)
        is_row = bool(shape) and same_size(shape[-1], self._keys) and all(same_size(size, 1) for size in shape[1:-1])
        return is_row and self._view.is_user_input(node) and not _is_looked_up(node)

    def _sizes(self) -> tuple[list[dict[Any, int]], list[dict[Any, int]]]:
        wanted = free_symbols((self._queries, self._keys))
        holders = {s: node for node in self._view.graph.nodes for s in wanted & free_symbols(node.meta.get("val"))}
        base = self._view.assignments([*self._nodes, *holders.values()], count=3)
        bounds = {symbol: self._bounds(symbol) for symbol in base[0]}
        low = {symbol: bound[0] for symbol, bound in bounds.items()}

        near = [*base, low]
        for sizes in base:
            near.append({symbol: size + 1 for symbol, size in sizes.items()})
            near.append(dict(zip(sizes, reversed(sizes.values()), strict=True)))
        lengths = [*_LENGTHS, *self._constants, *(constant + 2 for constant in self._constants)]
        far = [low | {symbol: size} for size in lengths for symbol in sorted(wanted, key=str)]

        def allowed(candidates: Sequence[Mapping[Any, int]]) -> list[dict[Any, int]]:
            inside = [{s: max(low[s], min(bounds[s][1], size)) for s, size in sizes.items()} for sizes in candidates]
            distinct = [sizes for i, sizes in enumerate(inside) if sizes not in inside[:i]]
            return [sizes for sizes in distinct if self._bytes(sizes) <= _CHEAP_BYTES]

        near = allowed(near)
        far = [sizes for sizes in allowed(far) if sizes not in near]
        most = int(concrete(self._keys, {symbol: bound[1] for symbol, bound in bounds.items()}))
        needed = self._needed_keys(most)
        if any(concrete(self._keys, sizes) >= needed for sizes in (*near, *far)):
            return near, far
        reaching = [low | {s: min(bounds[s][1], needed)} for s in free_symbols(self._keys)] or base
        reaching = [sizes for sizes in reaching if concrete(self._keys, sizes) >= needed]
        dear = min(reaching, key=self._bytes, default=None)
        if dear is None or self._bytes(dear) > _MOST_BYTES:
            raise Unproved(
                f"a proof needs an evaluation at {needed} keys, which takes more than {_MOST_BYTES >> 30} GiB"
            )
        return near, [*far, dear]

    def _needed_keys(self, most: int) -> int:
        """How many keys some evaluation must have, so that no constant and no stored mask acts only beyond it."""
        stored = [int(size) for node in self._nodes if self._view.is_weight(node) for size in shape_of(node)]
        reach = sum(constant for constant in self._constants if constant < most) + 2
        return min(most, max([reach, *stored]))

    def _bounds(self, symbol: Any) -> tuple[int, int]:
        limits = self._view.exported.range_constraints.get(symbol)
        low = int(limits.lower) if limits is not None and limits.lower.is_finite else 1
        high = int(limits.upper) if limits is not None and getattr(limits.upper, "is_finite", False) else 1 << 30
        return max(low, 1), high

    def _bytes(self, sizes: Mapping[Any, int]) -> int:
        """What an evaluation allocates."""
        total = 0
        for node in self._nodes:
            if isinstance(node.meta.get("val"), Tensor) and not is_call(node, aten.expand.default):
                elements = math.prod(int(concrete(size, sizes)) for size in shape_of(node))
                total += elements * node.meta["val"].element_size()
        return total

    def _sample(self, sizes: Mapping[Any, int], draw: int, roles: Roles, generator: torch.Generator) -> Sample:
        queries, keys = int(concrete(self._queries, sizes)), int(concrete(self._keys, sizes))
        where = [f"{symbol}={size}" for symbol, size in sizes.items()]
        given: dict[Node, Any] = {node: self._like(node, sizes) for node in self._shaped}
        positions, padding = torch.zeros(1, 1, dtype=torch.int64), None
        for node in self._inputs:
            shape = [int(concrete(size, sizes)) for size in shape_of(node)]
            length = shape[-1] if shape else 1
            rows = math.prod(shape) // length
            if node is roles.positions:
                name, row = _POSITIONS[draw]
                values = torch.stack([row(length, keys, generator) for _ in range(rows)]).clamp(0, keys - 1)
                positions = values
                where.append(name)
            elif node is roles.padding:
                name, row = _PADDING[draw]
                values = torch.stack([row(length, keys, generator) for _ in range(rows)])
                padding = values[:, None]
                where.append(name)
            else:
                pool = torch.tensor([0, 1, 2, keys - 1, *self._constants, *(-c for c in self._constants)])
                values = pool[_random(len(pool), rows * length, generator)]
            given[node] = values.reshape(shape).to(node.meta["val"].device, dtype_of(node))
        keep = _kept(self._view.evaluate(self._mask, given, sizes).detach().cpu())
        keep = keep.broadcast_to(torch.broadcast_shapes(keep.shape, (queries, keys)))
        if keep.shape[-2:] != (queries, keys):
            raise RuntimeError(f"it is {list(keep.shape)} for {queries} queries and {keys} keys")
        return Sample(", ".join(where) or "the only size", queries, keys, positions, padding, keep)

    def _like(self, node: Node, sizes: Mapping[Any, int]) -> Any:
        """Compute an operator that needs its first argument's shape only."""
        model = node.args[0]
        assert isinstance(model, Node)
        assert callable(node.target)
        shape = [int(concrete(size, sizes)) for size in shape_of(model)]
        stand_in = torch.zeros(shape, dtype=dtype_of(model), device=model.meta["val"].device)
        args, kwargs = map_arg((node.args[1:], node.kwargs), lambda n: self._view.evaluate(n, {}, sizes))
        return node.target(stand_in, *args, **kwargs)


def _random(below: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(below, (count,), generator=generator)


def _kept(value: Tensor) -> Tensor:
    """The scores that a mask keeps, as bool.

    Raises:
        Unproved: The mask adds something else than zero or a very negative number.
    """
    if value.dtype is torch.bool:
        return value
    kept = value == 0
    biased = ~(kept | (value <= _LOWEST))
    if biased.any():
        raise Unproved(f"the mask adds a bias, for example {float(value[biased][0]):.4g}")
    return kept


def _constants(view: GraphView, nodes: Sequence[Node]) -> Iterator[int]:
    """The integers that a subgraph contains, without sign: in arguments, in sizes, in one-element constants."""
    for node in nodes:
        found: list[Any] = list(pytree.tree_leaves((node.args, dict(node.kwargs))))
        sizes = [size for size in (*shape_of(node), node.meta.get("val")) if isinstance(size, SymInt)]
        found += [int(number) for size in sizes for number in size.node.expr.atoms(sympy.Integer)]
        stored = view.tensor(node)
        if stored is not None and stored.numel() == 1 and stored.device.type != "meta":
            found.append(stored.item())
        for number in found:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            is_fill = _is_float(node) and number <= _LOWEST
            if abs(number) < 1 << 31 and number == int(number) and not is_fill:
                yield abs(int(number))


def _is_read(view: GraphView, node: Node) -> bool:
    """Whether a node's value is known only when the program runs."""
    return node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor) and not view.is_weight(node)


def _is_float(node: Node) -> bool:
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


def _is_looked_up(node: Node) -> bool:
    """Whether an input is looked up in an embedding: it then says what a token is, not that it is there."""
    return any(
        (is_call(user, aten.embedding.default) and user.args[1] is node)
        or (is_call(user, *VIEWS, *CASTS) and _is_looked_up(user))
        for user in node.users
    )
