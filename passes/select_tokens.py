"""ASTRAEA: a block is computed for the tokens that changed, the others keep what it gave in an earlier step.

    x ── block ── y

becomes, with k tokens of N as the step's budget says, and X, Y, L, n kept from the step before,

    S = w0 * L * |x - X| + w1 * exp(n)      tokens = top k of S        L: log-sum-exp of attention, n: steps skipped
    k, v of all x;   q, attention, cross-attention, MLP of x[tokens] ── y'
    y = Y with y' at the tokens;   Y, L, n follow, n counts up for the others

Rows of the score map are left out, never keys, so the softmax of a row that is computed is exact. The input X of a
block is the output Y of the one before it, so the state is one tensor of tokens between two blocks. With a budget of 1
the block is as it was, bit for bit, and fills the state; with 0 the step gives the model's previous output.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.fx.node import map_arg

from ..kernels import attention_lse as _attention  # (also registers the operator)
from ..patterns.block_site import BlockSite
from ..patterns.nodes import RESHAPES, aten, dtype_of, same_size, shape_of
from ..patterns.token_axis import sizes_of
from .base import SitePass
from .edit import Edit

LEVELS = 10
"""Budgets are tenths of the tokens (the paper's grid)."""
_MOST_SKIPS = 10.0
"""From here on the penalty grows no more: exp(10) outweighs every change, and exp(89) is infinite."""
OUTPUT = "astraea.output"
"""State: what the program returned last."""


@dataclass(frozen=True)
class SelectTokens(SitePass[BlockSite]):
    """Compute a block for some of its tokens.

    Attributes:
        budget: Tenths of the tokens, 0 to 10.
        before: Place of the block whose output this one reads, "" for the first.
        last: Whether no block follows: what the program returns is kept then, for steps of budget 0.
        weights: Factors of the change and of the penalty, w0 and w1.
        normalise: Divide the change by its mean over the tokens, so that the factors mean the same everywhere.
        residual: Let tokens that are not selected keep what the block added to them, not what it gave.
        tokens: "score", or for comparison "fixed": the same, evenly spread, in all steps and blocks.
        keys: "all", or for comparison "selected": those of the selected tokens only.
    """

    name: ClassVar[str] = "select_tokens"
    changes_state: ClassVar[bool] = True
    by_step: ClassVar[bool] = True

    budget: int = LEVELS
    before: str = ""
    last: bool = False
    weights: Sequence[float] = (1.0, 0.5)
    normalise: bool = True
    residual: bool = False
    tokens: str = "score"
    keys: str = "all"

    def guard(self, site: BlockSite, edit: Edit) -> str | None:
        """Static sizes, an attention without a mask, and the operator's contract."""
        if not (isinstance(self.budget, int) and 0 <= self.budget <= LEVELS):
            return f"a budget is 0 to {LEVELS} tenths, got {self.budget}"
        if self.tokens not in ("score", "fixed") or self.keys not in ("all", "selected"):
            return f"got tokens={self.tokens!r} and keys={self.keys!r}, expected score or fixed, and all or selected"
        if len(self.weights) != 2:
            return f"got {len(self.weights)} weights, expected those of the change and of the penalty"
        if not (isinstance(site.batch, int) and isinstance(site.tokens, int)):
            return "batch or tokens are dynamic, and what is kept between steps has one size"
        if 0 < self.budget < LEVELS and self.count(site) in (0, site.tokens):
            return f"{self.budget} tenths of {site.tokens} tokens are none or all of them"
        attention = site.attention
        if attention.mask.kind not in ("none", "always"):
            return f"its attention has a mask ({attention.mask.kind})"
        if self.last and _output(edit) is None:
            return "the program does not return one tensor"
        return _attention.CONTRACT.check(
            query=attention.query.meta["val"], key=attention.key.meta["val"], value=attention.value.meta["val"]
        )

    def count(self, site: BlockSite) -> int:
        """Number of tokens that are computed."""
        return round(self.budget * site.tokens / LEVELS)

    def rewrite(self, site: BlockSite, edit: Edit) -> None:
        """Rewrite the block as its budget says."""
        state = _State(site, self.before, edit)
        if self.budget == LEVELS:
            self._whole(site, state, edit)
        elif self.budget:
            self._some(site, state, edit)
        else:
            # What the block reads has not changed, so nothing is computed; all tokens have waited one step more.
            skips = edit.call(aten.add.Tensor, state.skips, 1.0, like=site.node)
            edit.keep_too(state.skips, skips)
            edit.replace(site.node, state.output)
        if self.last:
            self._keep_output(site, edit)

    def _whole(self, site: BlockSite, state: _State, edit: Edit) -> None:
        attention = site.attention
        output, lse = _attend(site, (attention.query, attention.key, attention.value), attention.node, edit)
        edit.replace(attention.node, output)
        edit.keep_too(state.output, site.node)
        edit.keep_too(state.lse, lse)
        edit.keep_too(state.skips, edit.call(aten.zeros_like.default, state.skips, like=site.node))
        if not self.before:
            edit.keep_too(state.input, edit.current(site.entry))

    def _some(self, site: BlockSite, state: _State, edit: Edit) -> None:
        picked = _Picked(site, self._index(site, state, edit), self.count(site), edit)
        full = site.full if self.keys == "all" else ()
        made, lse = _Partial(site, picked, full, edit).run()
        base = state.output
        if self.residual:
            added = edit.call(aten.sub.Tensor, state.output, state.input, like=site.node)
            base = edit.call(aten.add.Tensor, site.entry, added, like=site.node)
        output = picked.put(base, 1, made)
        edit.replace(site.node, output)
        edit.keep_too(state.output, output)
        edit.keep_too(state.lse, picked.put(state.lse, 1, lse))
        waited = edit.call(aten.add.Tensor, state.skips, 1.0, like=site.node)
        edit.keep_too(state.skips, picked.fill(waited, 1, 0.0))
        if not self.before:
            edit.keep_too(state.input, edit.current(site.entry))

    def _index(self, site: BlockSite, state: _State, edit: Edit) -> Node:
        """The tokens to compute, ascending, int64 [B, k]."""
        like, count = site.node, self.count(site)
        if self.tokens == "fixed":
            device = site.entry.meta["val"].device
            spread = torch.arange(count, device=device) * site.tokens // count
            name = f"astraea.fixed_{count}_{site.batch}"
            return edit.buffer(name, lambda: spread.expand(site.batch, -1).clone())
        changed = edit.call(aten.sub.Tensor, site.entry, state.input, like=like)
        if dtype_of(site.entry) is not torch.float32:
            changed = edit.call(aten._to_copy.default, changed, dtype=torch.float32, like=like)
        # The norm over the root of the number of channels, so that it does not depend on the width.
        changed = edit.call(aten.mean.dim, edit.call(aten.square.default, changed, like=like), [2], like=like)
        signal = edit.call(aten.mul.Tensor, state.lse, edit.call(aten.sqrt.default, changed, like=like), like=like)
        if self.normalise:
            mean = edit.call(aten.mean.dim, edit.call(aten.abs.default, signal, like=like), [1], True, like=like)
            mean = edit.call(aten.clamp_min.default, mean, torch.finfo(torch.float32).tiny, like=like)
            signal = edit.call(aten.div.Tensor, signal, mean, like=like)
        waited = edit.call(aten.clamp_max.default, state.skips, _MOST_SKIPS, like=like)
        penalty = edit.call(aten.mul.Tensor, edit.call(aten.exp.default, waited, like=like), self.weights[1], like=like)
        score = edit.call(aten.mul.Tensor, signal, self.weights[0], like=like)
        score = edit.call(aten.add.Tensor, score, penalty, like=like)
        best = edit.call(aten.topk.default, score, count, 1, True, False, like=like)
        index = edit.call(operator.getitem, best, 1, like=like)
        return edit.call(operator.getitem, edit.call(aten.sort.default, index, 1, like=like), 0, like=like)

    def _keep_output(self, site: BlockSite, edit: Edit) -> None:
        returned = _output(edit)
        assert returned is not None
        value = returned.meta["val"]
        kept = edit.state(OUTPUT, lambda: torch.zeros(value.shape, dtype=value.dtype, device=value.device))
        if self.budget:
            edit.keep_too(kept, returned)
        else:
            # A copy: the caller may hold it when a later step writes the next one.
            edit.replace(returned, edit.call(aten.clone.default, kept, like=returned))


class _State:
    """What a block keeps between steps: placeholders, each read as the step before left it."""

    def __init__(self, site: BlockSite, before: str, edit: Edit) -> None:
        value = site.entry.meta["val"]
        shape, device = (site.batch, site.tokens), value.device

        def tokens() -> Tensor:
            return torch.zeros(value.shape, dtype=value.dtype, device=device)

        def numbers() -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        own = _name(site.place)
        self.output = edit.state(f"{own}.output", tokens)
        self.input = edit.state(f"{_name(before)}.output" if before else f"{own}.input", tokens)
        self.lse = edit.state(f"{own}.lse", numbers)
        self.skips = edit.state(f"{own}.skips", numbers)


def _name(place: str) -> str:
    """A name for a block's state; a place may have characters that names of buffers may not."""
    readable = re.sub(r"\W", "_", place.rsplit("/", 1)[0])
    return f"astraea.{readable}_{hashlib.sha256(place.encode()).hexdigest()[:6]}"


def _output(edit: Edit) -> Node | None:
    """The one tensor that the program returns."""
    values = edit.graph.output_node().args[0]
    specs = edit.exported.graph_signature.output_specs
    assert isinstance(values, list | tuple)
    returned = [v for v, spec in zip(values, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
    return returned[0] if len(returned) == 1 and isinstance(returned[0], Node) else None


def _attend(site: BlockSite, operands: Sequence[Node], before: Node, edit: Edit) -> tuple[Node, Node]:
    """Attention, and the logarithms of its sums as means over heads, [B, queries]."""
    like, target = site.attention.node, torch.ops.graphwright.attention_lse.default
    both = edit.call(target, *operands, scale=site.attention.scale, like=like, before=before)
    output, lse = (edit.call(operator.getitem, both, part, like=like, before=before) for part in range(2))
    return output, edit.call(aten.mean.dim, lse, [1], like=like, before=before)


@dataclass(frozen=True)
class _Picked:
    """The tokens that are computed: `index` int64 [B, count]."""

    site: BlockSite
    index: Node
    count: int
    edit: Edit

    def take(self, node: Node, dim: int) -> Node:
        """Their rows of a tensor; of one that is the same for the whole batch, a row for each of the batch."""
        edit, like, sizes = self.edit, self.site.node, list(sizes_of(node))
        if self.site.batch == 1:
            flat = edit.call(aten.reshape.default, self.index, [-1], like=like)
            return edit.call(aten.index_select.default, node, dim, flat, like=like)
        if same_size(sizes[0], 1):
            sizes[0] = self.site.batch
            node = edit.call(aten.expand.default, node, sizes, like=like)
        return edit.call(aten.gather.default, node, dim, self._wide(sizes, dim), like=like)

    def put(self, base: Node, dim: int, rows: Node) -> Node:
        """The base with new rows at the tokens."""
        edit, like = self.edit, self.site.node
        if self.site.batch == 1:
            flat = edit.call(aten.reshape.default, self.index, [-1], like=like)
            return edit.call(aten.index_copy.default, base, dim, flat, rows, like=like)
        return edit.call(aten.scatter.src, base, dim, self._wide(list(sizes_of(base)), dim), rows, like=like)

    def fill(self, base: Node, dim: int, value: float) -> Node:
        """The base [B, N] with a number at the tokens."""
        return self.edit.call(aten.scatter.value, base, dim, self.index, value, like=self.site.node)

    def _wide(self, sizes: list[Any], dim: int) -> Node:
        """The index as wide as a tensor of these sizes; the batch is its first dimension."""
        like = self.site.node
        sizes = [self.count if place == dim else size for place, size in enumerate(sizes)]
        narrow = [size if place in (0, dim) else 1 for place, size in enumerate(sizes)]
        index = self.edit.call(aten.reshape.default, self.index, narrow, like=like)
        return self.edit.call(aten.expand.default, index, sizes, like=like)


class _Partial:
    """Makes the calls of a block's region again, for some of the tokens."""

    def __init__(self, site: BlockSite, picked: _Picked, full: Sequence[Node], edit: Edit) -> None:
        self.site, self.picked, self.edit = site, picked, edit
        self.full = set(full)
        # Where the block before was rewritten, the calls inside read what stands for its exit now.
        self.entry = edit.current(site.entry)
        self.again = [node for node in (*site.full, *site.partial) if node not in self.full]
        order = {node: place for place, node in enumerate(edit.graph.nodes)}
        self.again.sort(key=order.__getitem__)
        self.made: dict[Node, Node] = {}
        self.taken: dict[Node, Node] = {}
        self.lse: Node | None = None

    def run(self) -> tuple[Node, Node]:
        """The exit's rows, and the logarithms of the attention's sums."""
        for node in self.again:
            self.made[node] = self._attention() if node is self.site.attention.node else self._again(node)
        assert self.lse is not None
        return self.made[self.site.node], self.lse

    def _attention(self) -> Node:
        attention = self.site.attention
        query = self.made.get(attention.query) or self._rows(attention.query)
        key, value = (self.made.get(operand, operand) for operand in (attention.key, attention.value))
        output, self.lse = _attend(self.site, (query, key, value), self.site.node, self.edit)
        return output

    def _again(self, node: Node) -> Node:
        mapped: Mapping[Node, Node] = {operand: self._operand(operand) for operand in node.all_input_nodes}
        args: Any = map_arg(node.args, mapped.__getitem__)
        kwargs: Any = map_arg(node.kwargs, mapped.__getitem__)
        return self.edit.call(node.target, *self._resized(node, list(args)), **kwargs, like=node, before=self.site.node)

    def _operand(self, operand: Node) -> Node:
        if operand in self.made:
            return self.made[operand]
        operand = self.site.entry if operand is self.entry else operand
        if operand in self.site.dims:
            return self._rows(operand)
        return operand

    def _rows(self, operand: Node) -> Node:
        """The picked rows of what is there for all tokens: the entry, a table, what keys and values are made of."""
        if operand not in self.taken:
            self.taken[operand] = self.picked.take(operand, self.site.dims[operand])
        return self.taken[operand]

    def _resized(self, node: Node, args: list[Any]) -> list[Any]:
        """Sizes among the arguments, with the number of tokens that is left."""
        if node.target not in (*RESHAPES, aten.expand.default) or not isinstance(args[-1], list | tuple):
            return args
        sizes, dim = list(args[-1]), self.site.dims[node]
        if len(sizes) == len(shape_of(node)) and isinstance(sizes[dim], int) and sizes[dim] != -1:
            sizes[dim] = self.picked.count
        if same_size(shape_of(node)[0], 1) is False and isinstance(sizes[0], int) and sizes[0] == 1:
            sizes[0] = self.site.batch
        return [*args[:-1], sizes]
