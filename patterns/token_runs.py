"""Where the tokens of a tensor come from: followed back, place by place, to what made them.

    q ── linear ── cat(text ── norm ── x, video ── add ── reshape(conv3d))      gives      x: 7 tokens, reshape: 72

Followed through everything that leaves tokens at their places (`token_axis.py`), through what cuts and joins them
(`token_pieces.py`), and through attention, whose output stands for its queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .attention_forms import SDPA
from .graph import GraphView
from .nodes import arguments, is_call, is_size, same_size
from .token_axis import ALIKE, reads, sizes_of
from .token_pieces import Piece, pieces

_OUR_ATTENTION = frozenset(
    {"graphwright.block_sparse_attention.default", "graphwright.block_sparse_attention_lse.default"}
)
"""Operators of ours that pass their query's tokens on, by name: patterns import no kernels."""


@dataclass(frozen=True, eq=False)  # Comparing dynamic sizes would add a guard to the program.
class Run:
    """Neighbouring tokens that come from one place: those of `source` along `dim`, from `start` on."""

    source: Node
    dim: int
    start: Any
    length: Any

    def is_same(self, other: Run) -> bool:
        """Whether two runs are provably the same tokens."""
        place = (self.source, self.dim) == (other.source, other.dim)
        return place and same_size(self.start, other.start) and same_size(self.length, other.length)


def token_runs(view: GraphView, node: Node, dim: int) -> tuple[Run, ...]:
    """Where the tokens of a tensor come from.

    Args:
        view: The graph.
        node: A tensor.
        dim: Its dimension that counts tokens, not negative.

    Returns:
        Runs in the order of the tokens. A source is what cannot be seen through: an input, a reshape that merges the
        axes of a grid into tokens, a choice of tokens by an index.
    """
    varying = _varying(view)
    runs: list[Run] = []
    stack = [Run(node, dim, 0, sizes_of(node)[dim])]
    while stack:
        run = stack.pop()
        before = _before(run, varying)
        if before is not None:
            stack.extend(reversed(before))
        elif runs and _continues(runs[-1], run):
            runs[-1] = Run(run.source, run.dim, runs[-1].start, runs[-1].length + run.length)
        else:
            runs.append(run)
    return tuple(runs)


def _before(run: Run, varying: set[Node]) -> list[Run] | None:
    """The same tokens one step back, None at a source."""
    parts = pieces(run.source, run.dim)
    if parts is not None:
        return _within(run, parts)
    if is_call(run.source, SDPA) or str(run.source.target) in _OUR_ATTENTION:
        query = arguments(run.source)["query"]
        return [Run(query, run.dim, run.start, run.length)] if run.dim == len(sizes_of(query)) - 2 else None
    candidates = [read for read in reads(run.source, run.dim) or () if read.operand in varying]
    if not candidates:
        return None
    # A table of positions is broadcast over heads; what it is applied to has the output's own shape.
    like = sizes_of(run.source)
    best = max(candidates, key=lambda read: sum(map(same_size, reversed(sizes_of(read.operand)), reversed(like))))
    return [Run(best.operand, best.dim, run.start, run.length)]


def _within(run: Run, parts: Iterable[Piece]) -> list[Run] | None:
    """The part of each piece that a run covers; None where that is not proved, or where it is padding."""
    found: list[Run] = []
    begin, end, offset = run.start, run.start + run.length, 0
    for part in parts:
        after = offset + part.length
        if not (statically_known_true(after <= begin) or statically_known_true(end <= offset)):
            whole = statically_known_true(begin <= offset) and statically_known_true(after <= end)
            inside = statically_known_true(offset <= begin) and statically_known_true(end <= after)
            if part.operand is None or not (whole or inside):
                return None
            skipped, length = (0, part.length) if whole else (begin - offset, run.length)
            found.append(Run(part.operand, part.dim, part.start + skipped, length))
        offset = after
    return found


def _continues(run: Run, later: Run) -> bool:
    return (run.source, run.dim) == (later.source, later.dim) and same_size(run.start + run.length, later.start)


def _varying(view: GraphView) -> set[Node]:
    """The tensors whose values depend on those that the program is called with."""
    found: set[Node] = set()
    for node in view.graph.nodes:
        if node.op == "placeholder":
            depends = not view.is_weight(node)
        else:
            depends = node.target not in ALIKE and any(parent in found for parent in node.all_input_nodes)
        if depends and not is_size(node):
            found.add(node)
    return found
