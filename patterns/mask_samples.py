"""Evaluations of an attention mask, with values drawn for the inputs that it reads.

An input may hold positions, or padding, or be without effect; each is drawn so that no other part could look like it.
What is taken to be without effect is drawn from the constants that it may be compared with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .graph import GraphView
from .mask_sizes import LOWEST, Unproved, constants_of, is_float, sizes_to_try
from .mask_slopes import Slopes, no_slopes, split_slopes
from .nodes import CASTS, VIEWS, NotEvaluable, aten, concrete, describe, dtype_of, is_call, same_size, shape_of

_MOST_NODES = 400

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
_STARTS: tuple[tuple[str, _Draw], ...] = (
    ("starts at 0", lambda n, keys, g: torch.zeros(n, dtype=torch.int64)),
    ("random starts", lambda n, keys, g: _random(keys, n, g)),
    ("random starts", lambda n, keys, g: _random(keys, n, g)),
    ("starts at the end", lambda n, keys, g: torch.full((n,), keys - 1)),
    ("random starts", lambda n, keys, g: _random(keys, n, g)),
)
"""What a draw is called, and one row of it, by its length; the n-th draws of all go together."""

_FAR_DRAWS = (1, 4)  # for large sizes: positions that reach as far as they can, and random ones


@dataclass(frozen=True)
class Roles:
    """What a mask's inputs are taken to be; the others have to be without effect."""

    positions: Node | None
    padding: Node | None
    starts: bool = False
    """Whether `padding` holds the first real key of each sequence, and not a mark for each key."""


@dataclass(frozen=True)
class Sample:
    """One evaluation of a mask.

    Attributes:
        where: Its sizes and draws, for reasons.
        queries, keys: How many.
        positions: [b, n], int64, where an input has that role.
        padding: [b, 1, keys], bool, which keys are real, where an input has that role.
        keep: What the mask keeps, [..., queries, keys], bool.
        slopes: Of what it adds to what it keeps; zeros where it adds nothing.
    """

    where: str
    queries: int
    keys: int
    positions: Tensor
    padding: Tensor | None
    keep: Tensor
    slopes: Slopes

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

    Raises:
        Unproved: The mask depends on what cannot be drawn, or an evaluation that a proof needs is too large.
    """

    def __init__(self, view: GraphView, mask: Node, queries: SymInt | int, keys: SymInt | int) -> None:
        self._view, self._mask, self._queries, self._keys = view, mask, queries, keys
        self._nodes = view.ancestors(mask, stop=[node for node in view.graph.nodes if is_call(node, *_LIKE)])
        self._shaped = [node for node in self._nodes if is_call(node, *_LIKE)]
        self._inputs = [node for node in self._nodes if _is_read(view, node)]
        self._refuse_what_cannot_be_drawn()
        self._constants = constants_of(view, self._nodes)
        self._near, self._far = sizes_to_try(view, self._nodes, queries, keys, self._constants)

    def roles(self) -> Iterator[Roles]:
        """The parts that the mask's inputs could play, the fewest first."""
        positions = [None, *filter(self._may_be_positions, self._inputs)]
        padding = [None, *filter(self._may_be_padding, self._inputs)]
        for position, pad in itertools.product(positions, padding):
            if position is None or position is not pad:
                yield Roles(position, pad)
        for position, start in itertools.product(positions, filter(self._may_be_starts, self._inputs)):
            if position is not start:
                yield Roles(position, start, starts=True)

    def samples(self, roles: Roles, *, far: bool = False) -> Iterator[Sample]:
        """Evaluate the mask at each of the near or far sizes, several times where it reads inputs.

        Raises:
            Unproved: It is not a mask, or it cannot be evaluated at most of the sizes.
        """
        generator = torch.Generator().manual_seed(0)
        assignments = self._far if far else self._near
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
        if not (dtype_of(self._mask) is torch.bool or is_float(self._mask)):
            raise Unproved(f"{describe(self._mask)} is neither bool nor float")
        for node in self._nodes:
            if node.target in _UNDEFINED or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise Unproved(f"the mask depends on a random or undefined value, {describe(node)}")
        for node in self._inputs:
            if not (self._may_be_positions(node) or self._may_be_padding(node) or self._may_be_starts(node)):
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

    def _may_be_starts(self, node: Node) -> bool:
        is_integer = dtype_of(node) in (torch.int64, torch.int32)
        return is_integer and len(shape_of(node)) == 1 and self._view.is_user_input(node) and not _is_looked_up(node)

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
            elif node is roles.padding and roles.starts:
                name, row = _STARTS[draw]
                values = row(length, keys, generator)
                padding = torch.arange(keys) >= values[:, None, None]
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
        keep, slopes = _kept(self._view.evaluate(self._mask, given, sizes).detach().cpu(), queries, keys)
        return Sample(", ".join(where) or "the only size", queries, keys, positions, padding, keep, slopes)

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


def _kept(value: Tensor, queries: int, keys: int) -> tuple[Tensor, Slopes]:
    """The scores that a mask keeps, bool [..., queries, keys], and the slopes of what it adds to them.

    Raises:
        Unproved: The mask adds something else than lines over the keys, or a very negative number.
    """
    shape = torch.broadcast_shapes(value.shape, (queries, keys))
    if shape[-2:] != (queries, keys):
        raise RuntimeError(f"it is {list(shape)} for {queries} queries and {keys} keys")
    kept = value if value.dtype is torch.bool else value == 0
    if value.dtype is not torch.bool and not bool((kept | (value <= LOWEST)).all()):
        return split_slopes(value.broadcast_to(shape))
    return kept.broadcast_to(shape), no_slopes(kept.broadcast_to(shape))


def _is_read(view: GraphView, node: Node) -> bool:
    """Whether a node's value is known only when the program runs."""
    return node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor) and not view.is_weight(node)


def _is_looked_up(node: Node) -> bool:
    """Whether an input is looked up in an embedding: it then says what a token is, not that it is there."""
    return any(
        (is_call(user, aten.embedding.default) and user.args[1] is node)
        or (is_call(user, *VIEWS, *CASTS) and _is_looked_up(user))
        for user in node.users
    )
