"""What an attention mask is, proved by evaluating the mask's own subgraph; every attention rewrite asks here.

A mask is a small program over sizes, positions and a padding input. It is computed at several concrete sizes, with
values drawn for the inputs that it reads (`mask_samples.py`), and each result is compared with what a hypothesis
(`_FORMS`) predicts. A hypothesis is a fact only where it predicts every element of every evaluation, so any way of
writing a mask is recognised, and a mask that deviates in a single pair is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import GraphView
from .mask_samples import MaskSampler, Roles, Sample
from .mask_sizes import Unproved, is_float
from .mask_slopes import common_slopes
from .nodes import aten, is_call, same_size, shape_of

MaskKind = Literal[
    "none",
    "always",
    "padding",
    "causal",
    "causal_top_left",
    "causal_bottom_right",
    "cache_causal",
    "alibi",
    "cache_alibi",
    "unknown",
]
"""Which keys j a query i sees, of Q queries and K keys, before `window` and `padding` take some away.

- `none`: all; there is no mask.
- `always`: all.
- `padding`: those that the padding input marks.
- `causal`: j <= i, and Q = K is proved.
- `causal_top_left`: j <= i, with Q and K independent, which is what SDPA's `is_causal` means.
- `causal_bottom_right`: j <= i + K - Q.
- `cache_causal`: j <= position of query i.
- `alibi`, `cache_alibi`: as `causal` and `cache_causal`, and the mask adds a bias that grows with j, by `slopes`.
- `unknown`: nothing was proved.
"""


@dataclass(frozen=True)
class MaskFact:
    """What was proved about a mask.

    Attributes:
        kind: See `MaskKind`.
        window: A query sees only keys j > (its last key by `kind`) - window.
        positions: For `cache_causal` and `cache_alibi` the int input or state that holds positions, [Q], [B, Q], [1]
            or []. Its values are taken to be in [0, K).
        per_row: The position of query i is `positions[..., i]`; otherwise it is `positions[..., 0] + i`.
        padding: The input [B, K] or [B, 1, 1, K] that is anded in: one where a key is real, else zero.
        starts: `padding` is int [B] instead: keys before `padding[b]` are not real. Its values are taken to be in
            [0, K).
        per_key: [1|B, 1, 1, K], the mask or what it is expanded from, where it says the same to every query and head:
            padding, whatever it is computed from. Known for masks of unknown kind too.
        additive: The mask is a float that is added to the scores (0 keeps, very negative drops), not a bool.
        slopes: By how much the bias grows from key to key, one number a query head, or one for all; empty where the
            mask adds none. What it adds to all keys of a query alike does not matter to softmax, and is left out.
        every_row_sees_a_key: No query is left without a key, whatever the sizes. Never claimed where there is padding.
        reason: One clause: what was proved, or how far the closest hypothesis came.
    """

    kind: MaskKind
    window: int | None = None
    positions: Node | None = None
    per_row: bool = False
    padding: Node | None = None
    starts: bool = False
    per_key: Node | None = None
    additive: bool = False
    slopes: tuple[float, ...] = ()
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
        The fact. It is kept as long as the graph is and what the mask is computed from stays the same, so a mask that
        many layers share is analysed once, whatever else is rewritten meanwhile.
    """
    if mask is None:
        if not is_causal:
            return MaskFact("none", every_row_sees_a_key=True, reason="there is no mask")
        kind = "causal" if same_size(queries, keys) else "causal_top_left"
        return MaskFact(kind, every_row_sees_a_key=True, reason="is_causal is set")
    if is_causal:
        return MaskFact("unknown", reason="the attention has both a mask and is_causal")
    known = _KNOWN.setdefault(view.graph, {})
    question = (mask, str(queries), str(keys))
    source = _source(view, mask)
    if question not in known or known[question][0] != source:
        try:
            hypothesis, samples = _prove(MaskSampler(view, mask, queries, keys))
            fact = _fact(hypothesis, samples, queries, keys)
        except Unproved as failure:
            fact = MaskFact("unknown", reason=str(failure))
        known[question] = source, replace(fact, per_key=_per_key(mask), additive=is_float(mask))
    return known[question][1]


def _source(view: GraphView, mask: Node) -> tuple[Any, ...]:
    """What a mask is computed from: its nodes with their arguments, and which tensors the stored ones are."""

    def tensor(node: Node) -> tuple[int, int] | None:
        stored = view.tensor(node) if node.op == "placeholder" else None
        return None if stored is None else (id(stored), stored._version)

    nodes = view.ancestors(mask)
    return tuple((node, node.target, node.args, tuple(node.kwargs.items()), tensor(node)) for node in nodes)


def _per_key(mask: Node) -> Node | None:
    """What a mask is expanded from, where that has one row for all queries and heads."""
    while True:
        sizes = shape_of(mask)
        if len(sizes) == 4 and same_size(sizes[1], 1) and same_size(sizes[2], 1):
            return mask
        if not (is_call(mask, aten.expand.default, aten.repeat.default) and isinstance(mask.args[0], Node)):
            return None
        before = shape_of(mask.args[0])
        # Repeating what has more than one row would repeat rows, not spread one.
        if len(before) != len(sizes) or not all(
            same_size(a, b) or same_size(a, 1) for a, b in zip(before, sizes, strict=True)
        ):
            return None
        mask = mask.args[0]


_KNOWN: WeakKeyDictionary[Graph, dict[tuple[Node, str, str], tuple[Any, MaskFact]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Form:
    """A kind of mask: the last key that each query sees, [b, queries or 1, 1]; None where it sees all."""

    kind: MaskKind
    says: str
    last: Callable[[Sample], Tensor] | None
    has_positions: bool = False
    per_row: bool = False


_FORMS = (
    _Form("always", "every key", None),
    _Form("causal", "key <= query", lambda s: s.rows),
    _Form("causal_bottom_right", "key <= query + keys - queries", lambda s: s.rows + s.keys - s.queries),
    _Form("cache_causal", "key <= positions[0] + query", lambda s: s.positions[:, :1, None] + s.rows, True),
    _Form("cache_causal", "key <= positions[query]", lambda s: s.positions[:, :, None], True, per_row=True),
)
"""Tried in this order, without and with a window, for every part that the mask's inputs could play."""


@dataclass(frozen=True)
class _Hypothesis:
    form: _Form
    roles: Roles
    window: int | None = None

    def __str__(self) -> str:
        says = self.form.says
        if self.roles.positions is not None:
            says = says.replace("positions", self.roles.positions.name)
        if self.window is not None:
            says = f"{says}, of these the last {self.window}"
        if self.roles.padding is None:
            return says
        return f"{says}, {'from' if self.roles.starts else 'where'} {self.roles.padding.name}" + (
            " on" if self.roles.starts else " is set"
        )

    def predict(self, sample: Sample) -> Tensor:
        """The keys that each query should see, [b, queries, keys]."""
        key = torch.arange(sample.keys)
        keep = torch.ones(1, sample.queries, sample.keys, dtype=torch.bool)
        if self.form.last is not None:
            last = self.form.last(sample)
            keep = (key <= last) if self.window is None else (key <= last) & (key > last - self.window)
        return keep if sample.padding is None else keep & sample.padding

    def contradiction(self, sample: Sample) -> str | None:
        """Where a sample differs from the prediction; None where it agrees in every element."""
        try:
            expected, observed = _aligned(self.predict(sample), sample.keep)
        except RuntimeError:
            return f"{sample.where}, by its shape"
        if torch.equal(expected, observed):
            return None
        first = torch.unravel_index((expected != observed).flatten().byte().argmax(), observed.shape)
        verb = "sees" if observed[first] else "does not see"
        return f"{sample.where}, where query {int(first[-2])} {verb} key {int(first[-1])}"

    def with_window(self, samples: Sequence[Sample]) -> _Hypothesis | None:
        """The same with the only window that could fit: the largest distance from a query's last key to one it sees."""
        if self.form.last is None:
            return None
        widest = 0
        for sample in samples:
            try:
                expected, observed = _aligned(self.predict(sample), sample.keep)
                distance, observed = _aligned(self.form.last(sample) - torch.arange(sample.keys), sample.keep)
            except RuntimeError:
                return None
            if (observed & ~expected).any():
                return None
            widest = max(widest, int(torch.where(observed, distance + 1, 0).max()))
        return replace(self, window=widest) if widest else None

    def every_row_sees_a_key(self, sample: Sample) -> bool:
        """Whether each query saw a key, those aside whose position is beyond the last key, which is out of contract."""
        seen = sample.keep.any(-1, keepdim=True)
        if self.form.last is not None and self.form.has_positions:
            beyond, seen = _aligned(self.form.last(sample) >= sample.keys, seen)
            seen = beyond | seen
        return bool(seen.all())


def _aligned(prediction: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """[b, queries, keys] and [..., queries, keys] at one shape: where the second has a batch, it is the first's.

    Raises:
        RuntimeError: They do not broadcast.
    """
    heads = [1] * (observed.dim() - 3)
    left, right = torch.broadcast_tensors(
        prediction.reshape(prediction.shape[0], *heads, *prediction.shape[1:]), observed
    )
    return left, right


def _prove(sampler: MaskSampler) -> tuple[_Hypothesis, list[Sample]]:
    """The first hypothesis that no sample contradicts, and the samples.

    Raises:
        Unproved: There is none; the message tells of the one that held longest.
    """
    misses: list[tuple[int, str]] = []
    for roles in sampler.roles():
        samples: list[Sample] = []
        try:
            samples += sampler.samples(roles)
            if _first_right(roles, samples, misses) is None:
                continue
            samples += sampler.samples(roles, far=True)
            right = _first_right(roles, samples, misses)
        except Unproved as failure:
            misses.append((len(samples), str(failure)))
            continue
        if right is not None:
            return right, samples
    held, reason = max(misses, key=lambda miss: miss[0])
    tried = "; ".join(form.says for form in _FORMS)
    raise Unproved(f"{reason} (tried, with and without window and padding: {tried})" if held else reason)


def _first_right(roles: Roles, samples: Sequence[Sample], misses: list[tuple[int, str]]) -> _Hypothesis | None:
    """The first hypothesis that holds. The others leave in `misses` how many samples they held, and what was wrong."""
    for form in _FORMS:
        if form.has_positions != (roles.positions is not None):
            continue
        hypothesis: _Hypothesis | None = _Hypothesis(form, roles)
        while hypothesis is not None:
            contradictions = (hypothesis.contradiction(sample) for sample in samples)
            held, wrong = next(((i, wrong) for i, wrong in enumerate(contradictions) if wrong), (len(samples), None))
            if wrong is None:
                return hypothesis
            misses.append((held, f"closest is `{hypothesis}`: right in {held} evaluations, wrong at {wrong}"))
            hypothesis = hypothesis.with_window(samples) if hypothesis.window is None else None
    return None


def _fact(hypothesis: _Hypothesis, samples: Sequence[Sample], queries: SymInt | int, keys: SymInt | int) -> MaskFact:
    form, roles = hypothesis.form, hypothesis.roles
    kind: MaskKind = form.kind
    slopes = common_slopes([(sample.where, sample.slopes) for sample in samples])
    sees = roles.padding is None and all(hypothesis.every_row_sees_a_key(sample) for sample in samples)
    if kind == "always" and roles.padding is not None:
        kind = "padding"
    if kind == "causal" and not same_size(queries, keys):
        kind = "causal_top_left"
        sees = sees and (hypothesis.window is None or statically_known_true(queries <= keys))
    if kind == "causal_bottom_right":
        sees = sees and statically_known_true(queries <= keys)
    if slopes is not None:
        if kind not in ("causal", "cache_causal"):
            raise Unproved(f"the mask adds a bias with a slope, and is not causal but keeps `{hypothesis}`")
        kind = "alibi" if kind == "causal" else "cache_alibi"
    return MaskFact(
        kind,
        hypothesis.window,
        roles.positions,
        form.per_row,
        roles.padding,
        roles.starts,
        slopes=slopes or (),
        every_row_sees_a_key=sees,
        reason=f"{hypothesis}{', with a slope over the keys' if slopes else ''} (evaluations: {len(samples)})",
    )
