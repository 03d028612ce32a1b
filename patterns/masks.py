"""What an attention mask is, proved by evaluating the mask's own subgraph; every attention rewrite asks here.

A mask is a small program over sizes, positions and a padding input. It is computed at several concrete sizes, with values drawn
for the inputs that it reads, and each result is compared with what a hypothesis (`_FORMS`) predicts. A hypothesis is a fact
only where it predicts every element of every evaluation. Three things keep that from being luck: sizes are odd and even, in
both orders, and as small as the program allows; inputs that a hypothesis does not use are drawn at random too; and the sizes
reach past every constant in the subgraph, so that a window of 4096 is not taken for plain causality on nineteen tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
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

MaskKind = Literal[
    "none", "always", "padding", "causal", "causal_top_left", "causal_bottom_right", "cache_causal", "unknown"
]
"""Which keys j a query i sees, of Q queries and K keys, before `window` and `padding` take some away.

`none`: there is no mask. `always`: all. `padding`: all that the padding input marks. `causal`: j <= i, and Q = K is proved.
`causal_top_left`: j <= i with Q and K independent (what SDPA's `is_causal` means). `causal_bottom_right`: j <= i + K - Q.
`cache_causal`: j <= position of query i. `unknown`: nothing was proved.
"""


@dataclass(frozen=True)
class MaskFact:
    """What was proved about a mask.

    Attributes:
        kind: See `MaskKind`.
        window: A query sees only keys j > (its last key by `kind`) - window.
        positions: For `cache_causal` the int input or state that holds positions, [Q], [B, Q], [1] or []. Its values are
            taken to be in [0, K).
        per_row: The position of query i is `positions[..., i]`; otherwise it is `positions[..., 0] + i`.
        padding: Input [B, K] (or [B, 1, 1, K]), nonzero (or one) where a key is real, that is anded in.
        additive: The mask is a float that is added to the scores (0 keeps, -10000 or less drops), not a bool.
        every_row_sees_a_key: No query is left without a key, whatever the sizes. Never claimed where there is padding.
        reason: One clause: what was proved, or how far the closest hypothesis came.
    """

    kind: MaskKind
    window: int | None = None
    positions: Node | None = None
    per_row: bool = False
    padding: Node | None = None
    additive: bool = False
    every_row_sees_a_key: bool = False
    reason: str = ""


def analyse_mask(
    view: GraphView, mask: Node | None, queries: SymInt | int, keys: SymInt | int, *, is_causal: bool = False
) -> MaskFact:
    """Prove what the mask of an attention is.

    Args:
        view: The graph.
        mask: The mask node, bool (True keeps) or float (added to the scores), broadcastable to [B, H, queries, keys].
        queries: Number of queries, from the query's metadata.
        keys: Number of keys, from the key's metadata.
        is_causal: SDPA's own flag, for an attention without a mask.

    Returns:
        The fact; for a mask that many layers share it is computed once.
    """
    if mask is None:
        return _without_mask(queries, keys, is_causal)
    if is_causal:
        return MaskFact("unknown", reason="the attention has both a mask and is_causal")
    known = _KNOWN.setdefault(view, {})
    question = (mask, str(queries), str(keys))
    if question not in known:
        try:
            known[question] = _Analysis(view, mask, queries, keys).fact()
        except _Unproved as failure:
            known[question] = MaskFact("unknown", additive=_is_float(mask), reason=str(failure))
    return known[question]


def _without_mask(queries: SymInt | int, keys: SymInt | int, is_causal: bool) -> MaskFact:
    if not is_causal:
        return MaskFact("none", every_row_sees_a_key=True, reason="there is no mask")
    kind = "causal" if same_size(queries, keys) else "causal_top_left"
    return MaskFact(kind, every_row_sees_a_key=True, reason="is_causal is set")


# ---- hypotheses


@dataclass(frozen=True)
class _Sample:
    """One evaluation of the mask.

    Attributes:
        where: Sizes and draw, for reasons.
        positions: [b, n], int64, where the hypothesis has positions.
        padding: [b, 1, keys], bool, where it has padding.
        keep: What the mask was, [..., queries, keys], bool.
    """

    where: str
    queries: int
    keys: int
    positions: Tensor
    padding: Tensor | None
    keep: Tensor

    @property
    def rows(self) -> Tensor:  # [1, queries, 1]
        return torch.arange(self.queries)[None, :, None]


@dataclass(frozen=True)
class _Form:
    """A hypothesis: the last key that each query sees ([b, queries, 1]); None where it sees all."""

    kind: MaskKind
    says: str
    last: Callable[[_Sample], Tensor] | None
    has_positions: bool = False
    per_row: bool = False


_FORMS = (
    _Form("always", "every key", None),
    _Form("causal", "key <= query", lambda s: s.rows),
    _Form("causal_bottom_right", "key <= query + keys - queries", lambda s: s.rows + s.keys - s.queries),
    _Form("cache_causal", "key <= positions[0] + query", lambda s: s.positions[:, :1, None] + s.rows, True),
    _Form("cache_causal", "key <= positions[query]", lambda s: s.positions[:, :, None], True, per_row=True),
)
"""Tried in this order, each without and with a window, and each for every part that the mask's inputs could play."""


def _predict(form: _Form, window: int | None, sample: _Sample) -> Tensor:
    """The keys that a hypothesis lets each query see, [b, queries, keys]."""
    key = torch.arange(sample.keys)
    keep = torch.ones(1, sample.queries, sample.keys, dtype=torch.bool)
    if form.last is not None:
        last = form.last(sample)
        keep = key <= last if window is None else (key <= last) & (key > last - window)
    return keep if sample.padding is None else keep & sample.padding


def _aligned(prediction: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """[b, queries, keys] and [..., queries, keys] at one shape, the batch first.

    Raises:
        RuntimeError: They do not broadcast.
    """
    between = max(keep.dim() - 3, 0)
    prediction = prediction.reshape(prediction.shape[0], *[1] * between, *prediction.shape[1:])
    return torch.broadcast_tensors(prediction, keep)  # pyright: ignore[reportReturnType]


def _difference(form: _Form, window: int | None, sample: _Sample) -> str | None:
    """Where a sample contradicts a hypothesis; None where it agrees in every element."""
    try:
        expected, observed = _aligned(_predict(form, window, sample), sample.keep)
    except RuntimeError:
        return f"{sample.where}, by its shape"
    if torch.equal(expected, observed):
        return None
    first = (expected != observed).nonzero()[0]
    verb = "sees" if observed[tuple(first)] else "does not see"
    return f"{sample.where}, where query {int(first[-2])} {verb} key {int(first[-1])}"


def _widest(form: _Form, samples: Sequence[_Sample]) -> int | None:
    """The only window that could fit: one more than the largest distance from a query's last key to one it sees."""
    widest = 0
    for sample in samples:
        if form.last is None:
            return None
        try:
            distance, keep = _aligned(form.last(sample) - torch.arange(sample.keys), sample.keep)
        except RuntimeError:
            return None
        widest = max(widest, int(torch.where(keep, distance + 1, 0).max()))
    return widest or None


# ---- evaluations


class _Unproved(Exception):
    """No hypothesis can be tested, or none holds; the message says why."""


_KNOWN: WeakKeyDictionary[GraphView, dict[tuple[Node, str, str], MaskFact]] = WeakKeyDictionary()

_MOST_NODES = 400
_CHEAP_BYTES = 1 << 25  # most that an evaluation allocates where others would do as well
_MOST_BYTES = 1 << 30  # most that the one evaluation that reaches the largest constant allocates: a window of 4096 fits
_LOWEST = -1e4  # an addend that removes a key in every float dtype: fp16 ends at -65504, older models write -10000

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


def _random(below: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(below, (count,), generator=generator)


@dataclass(frozen=True)
class _Roles:
    """What the mask's inputs are taken to be; the rest has to be without effect."""

    positions: Node | None
    padding: Node | None


class _Analysis:
    """One mask: what it is computed from, at which sizes to evaluate it, and which hypothesis holds."""

    def __init__(self, view: GraphView, mask: Node, queries: SymInt | int, keys: SymInt | int) -> None:
        self.view, self.mask, self.queries, self.keys = view, mask, queries, keys
        self.shaped = [node for node in view.graph.nodes if is_call(node, *_LIKE)]
        self.nodes = view.ancestors(mask, stop=self.shaped)
        self.inputs = [node for node in self.nodes if node.op == "placeholder" and not view.is_weight(node)]
        if not (dtype_of(mask) is torch.bool or _is_float(mask)):
            raise _Unproved(f"{describe(mask)} is neither bool nor float")
        if len(self.nodes) > _MOST_NODES:
            raise _Unproved(f"the mask is computed by {len(self.nodes)} nodes, more than the {_MOST_NODES} looked at")
        for node in self.nodes:
            if node.target in _UNDEFINED or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise _Unproved(f"the mask depends on a random or undefined value, {describe(node)}")
        for node in self.inputs:
            if not (self.may_be_positions(node) or self.may_be_padding(node)):
                raise _Unproved(f"the mask depends on the value of {describe(node)}")
        self.constants = sorted(set(self.scalars()))
        self.cheap, self.dear = self.sizes()

    def fact(self) -> MaskFact:
        """The first hypothesis that holds, for the first roles of the inputs under which one does.

        Raises:
            _Unproved: None holds.
        """
        failures: list[tuple[float, str]] = []
        for roles in self.roles():
            forms = [form for form in _FORMS if form.has_positions == (roles.positions is not None)]
            try:
                samples = list(self.samples(self.cheap, roles))
                found, failed = _first_that_holds(forms, samples)
                if found is not None and self.dear:
                    samples += self.samples(self.dear, roles)
                    found, failed = _first_that_holds(forms, samples)
            except _Unproved as failure:
                failures.append((0.0, str(failure)))
                continue
            if found is not None:
                return self.state(*found, roles, samples)
            failures.append(failed)
        raise _Unproved(max(failures, key=lambda failure: failure[0])[1])

    def state(self, form: _Form, window: int | None, roles: _Roles, samples: Sequence[_Sample]) -> MaskFact:
        """Put what was proved into a fact."""
        kind: MaskKind = form.kind
        if kind == "always" and roles.padding is not None:
            kind = "padding"
        if kind == "causal" and not same_size(self.queries, self.keys):
            kind = "causal_top_left"
        sees = roles.padding is None and all(_rows_see(form, sample) for sample in samples)
        if kind == "causal_bottom_right":
            sees = sees and statically_known_true(self.keys >= self.queries)
        if kind == "causal_top_left" and window is not None:
            sees = sees and statically_known_true(self.queries <= self.keys)
        says = form.says if window is None else f"{form.says} and within {window}"
        if roles.positions is not None:
            says = says.replace("positions", roles.positions.name)
        if roles.padding is not None:
            says = f"{says}, where {roles.padding.name} is set"
        reason = f"{says} ({len(samples)} evaluations)"
        additive = _is_float(self.mask)
        return MaskFact(kind, window, roles.positions, form.per_row, roles.padding, additive, sees, reason)

    # -- inputs

    def roles(self) -> Iterator[_Roles]:
        positions = [None, *filter(self.may_be_positions, self.inputs)]
        padding = [None, *filter(self.may_be_padding, self.inputs)]
        for position, pad in itertools.product(positions, padding):
            if position is None or position is not pad:
                yield _Roles(position, pad)

    def may_be_positions(self, node: Node) -> bool:
        shape = shape_of(node)
        is_row = not shape or same_size(shape[-1], self.queries) or same_size(shape[-1], 1)
        return dtype_of(node) in (torch.int64, torch.int32) and len(shape) <= 2 and is_row

    def may_be_padding(self, node: Node) -> bool:
        shape = shape_of(node)
        is_row = bool(shape) and same_size(shape[-1], self.keys) and all(same_size(size, 1) for size in shape[1:-1])
        return is_row and self.view.is_user_input(node) and not _is_token_index(node)

    # -- sizes

    def scalars(self) -> Iterator[int]:
        """The integers that the subgraph contains: in arguments, in sizes, in one-element constants."""
        for node in self.nodes:
            value = node.meta.get("val")
            found: list[Any] = [leaf for leaf in pytree.tree_leaves((node.args, dict(node.kwargs)))]
            for size in shape_of(node) if isinstance(value, Tensor) else (value,):
                if isinstance(size, SymInt):
                    found += [int(number) for number in size.node.expr.atoms(sympy.Integer)]
            stored = self.view.tensor(node)
            if stored is not None and stored.numel() == 1 and stored.device.type != "meta":
                found.append(stored.item())
            for number in found:
                if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                    continue
                is_fill = _is_float(node) and number <= _LOWEST
                if number == int(number) and abs(number) < 1 << 31 and not is_fill:
                    yield abs(int(number))

    def sizes(self) -> tuple[list[dict[Any, int]], list[dict[Any, int]]]:
        """Sizes at which to evaluate: cheap ones, and at most one that is dear but reaches past every constant."""
        wanted = free_symbols((self.queries, self.keys))
        holders = [next(n for n in self.view.graph.nodes if s in free_symbols(n.meta.get("val"))) for s in wanted]
        base = self.view.assignments([*self.nodes, *holders], count=3)
        low = {symbol: self.bounds(symbol)[0] for symbol in base[0]}
        high = {symbol: self.bounds(symbol)[1] for symbol in base[0]}
        candidates = [*base, low]
        for sizes in base:
            candidates.append({symbol: size + 1 for symbol, size in sizes.items()})
            candidates.append(dict(zip(sizes, reversed(sizes.values()), strict=True)))
        for constant, more, symbol in itertools.product(self.constants, (0, 2), sorted(wanted, key=str)):
            candidates.append(low | {symbol: constant + more})

        clamped = [{s: max(low[s], min(high[s], size)) for s, size in sizes.items()} for sizes in candidates]
        distinct = [sizes for i, sizes in enumerate(clamped) if sizes not in clamped[:i]]
        cheap = [sizes for sizes in distinct if self.bytes(sizes) <= _CHEAP_BYTES]

        needed = self.needed_keys(int(concrete(self.keys, high)))
        if any(concrete(self.keys, sizes) >= needed for sizes in cheap):
            return cheap, []
        reaching = [low | {s: min(high[s], needed)} for s in free_symbols(self.keys)] or distinct
        reaching = [sizes for sizes in reaching if concrete(self.keys, sizes) >= needed]
        dearest = min(reaching, key=self.bytes, default=None)
        if dearest is None or self.bytes(dearest) > _MOST_BYTES:
            raise _Unproved(f"a constant in the mask may act at {needed} keys, more than can be evaluated")
        return cheap, [dearest]

    def needed_keys(self, most: int) -> int:
        """How many keys an evaluation must have so that no constant acts beyond it only."""
        stored = [size for node in self.nodes if self.view.is_weight(node) for size in shape_of(node)]
        beyond = [constant + 2 for constant in self.constants if constant < most]
        return min(most, max([1, *beyond, *(int(size) for size in stored)]))

    def bounds(self, symbol: Any) -> tuple[int, int]:
        limits = self.view.exported.range_constraints.get(symbol)
        low = int(limits.lower) if limits is not None and limits.lower.is_finite else 1
        high = int(limits.upper) if limits is not None and getattr(limits.upper, "is_finite", False) else 1 << 30
        return max(low, 1), high

    def bytes(self, sizes: Mapping[Any, int]) -> int:
        """What an evaluation allocates, at most."""
        total = 0
        for node in self.nodes:
            if not is_call(node, aten.expand.default) and isinstance(node.meta.get("val"), Tensor):
                elements = math.prod(int(concrete(size, sizes)) for size in shape_of(node))
                total += elements * node.meta["val"].element_size()
        return total

    # -- values

    def samples(self, assignments: Sequence[Mapping[Any, int]], roles: _Roles) -> Iterator[_Sample]:
        """Evaluate the mask at each of the sizes, several times where it reads inputs.

        Raises:
            _Unproved: It cannot be evaluated at most sizes, or it is not a mask.
        """
        generator = torch.Generator().manual_seed(0)
        draws = range(len(_POSITIONS)) if self.inputs else range(1)
        failures = 0
        for sizes, draw in itertools.product(assignments, draws):
            try:
                yield self.sample(sizes, draw, roles, generator)
            except NotEvaluable as failure:
                raise _Unproved(f"the mask depends on the value of {describe(failure.node)}") from None
            except (RuntimeError, IndexError, KeyError, TypeError, ValueError, AssertionError) as failure:
                failures += 1
                if 2 * failures >= len(assignments) * len(draws):
                    raise _Unproved(f"the mask cannot be evaluated: {str(failure).splitlines()[0]}") from None
