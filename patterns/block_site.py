"""Transformer blocks as regions of the graph, in which all but attention treats tokens one by one.

    x ── norm, modulation ┬ q ─┐
     │                    ├ k ─ attention ─ o, gate ── + ── cross-attention ── + ── mlp ── + ── y
     │                    └ v ─┘                       │                      │            │
     └─────────────────────────────────────────────────┴──────────────────────┴────────────┘

`x` and `y` are cut nodes of the stream of tokens: every path of tokens from the patches to the output goes through them
(they dominate it). Between two cuts lies the region of a block: one self-attention, a single entry `x`, a single exit
`y`, and nothing that leaves and comes back (it is convex). What the keys and values need is computed for all tokens,
the rest may be computed for some.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
from torch import Tensor
from torch.fx import Node

from .attention import AttentionSite, find_attention
from .graph import GraphView, Refusal
from .nodes import aten, is_call, is_size, same_shape, same_size, shape_of
from .residual import live_nodes
from .site import Found, Ordinals, Site
from .token_axis import ALIKE, reader_dim, reads, sizes_of, values_read


@dataclass(frozen=True, eq=False)  # Comparing dynamic sizes would add a guard to the program.
class BlockSite(Site):
    """One transformer block; its node is the exit.

    Attributes:
        entry: The tokens that it reads, [batch, tokens, channels]; its node has the same shape.
        attention: The self-attention inside.
        cross: Other attentions inside, of its tokens to what is not.
        linears: Linears inside that are no projection of an attention: the MLP, in graph order.
        modulation: What depends on the call but has no tokens: shifts, scales, gates, text.
        tables: What has tokens but does not depend on the call: rotary tables.
        dims: The dimension that counts tokens, of everything inside, of the entry and of the tables.
        full: What keys and values are computed from inside, for all tokens, in graph order.
        partial: The rest, in graph order; the exit is its last.
        tokens, channels, batch: Sizes of the entry.
    """

    kind: ClassVar[str] = "block"

    entry: Node
    attention: AttentionSite
    cross: tuple[Node, ...]
    linears: tuple[Node, ...]
    modulation: tuple[Node, ...]
    tables: tuple[Node, ...]
    dims: Mapping[Node, int]
    full: tuple[Node, ...]
    partial: tuple[Node, ...]
    tokens: Any
    channels: int
    batch: Any

    def describe(self) -> dict[str, str]:
        """Facts for tables."""
        return {
            "role": "block",
            "attention": self.attention.id,
            "tokens": str(self.tokens),
            "channels": str(self.channels),
            "cross-attentions": str(len(self.cross)),
            "linears": str(len(self.linears)),
            "modulation": f"{len(self.modulation)} inputs",
            "calls": f"{len(self.full)} for all tokens, {len(self.partial)} for some",
        }


def find_blocks(view: GraphView, phase: str = "main") -> Found[BlockSite]:
    """Find the blocks around all self-attentions of a canonical program.

    Refused, with the fact: several streams of tokens (joint attention of text and video), a second exit, two
    self-attentions between two cuts, an operator that mixes tokens, a region that is not convex.
    """
    sites: list[BlockSite] = []
    refusals: list[Refusal] = []
    ordinals = Ordinals(phase)
    attentions = [site for site in find_attention(view, phase).sites if site.attention != "cross"]
    streams: list[_Stream] = []
    for number, attention in enumerate(attentions):
        site_id = ordinals.next_id(_block_path(attention.module_path), BlockSite.kind)
        if attention.attention == "joint":
            refusals.append(view.refuse(attention.node, "its attention joins two streams of tokens, text and video"))
            continue
        stream = next((known for known in streams if attention.node in known.dims), None)
        if stream is None:
            stream = _Stream(view, attention)
            streams.append(stream)
        found = stream.block(attention, attentions[number + 1 :], site_id)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            sites.append(found)
    return Found(tuple(sites), tuple(refusals))


def _block_path(attention: str) -> str:
    """The module around an attention's own: a label, no fact."""
    return attention.rpartition(".")[0]


class _Stream:
    """The tokens that an attention's queries descend from and that descend from them, as a graph of nodes.

    Attributes:
        dims: Member -> its dimension that counts tokens.
        cuts: The members that every path of tokens passes, in order; empty where `refusal` says why.
    """

    def __init__(self, view: GraphView, attention: AttentionSite) -> None:
        self.view = view
        self.alive = live_nodes(view)
        self.varying = _varying(view)
        self.order = {node: place for place, node in enumerate(view.graph.nodes)}
        self.dims: dict[Node, int] = {}
        self.refusal: Refusal | None = None
        self.cuts: list[Node] = []
        self._grow(attention)
        self._graph = nx.DiGraph()
        if self.refusal is None:
            self._find_cuts(attention)

    # ---- members

    def _grow(self, attention: AttentionSite) -> None:
        stack = [(attention.node, 2)]
        while stack:
            node, dim = stack.pop()
            known = self.dims.get(node)
            if known is not None:
                if known != dim:
                    self._refuse(node, "its tokens stand in two dimensions", dims=(known, dim))
                continue
            self.dims[node] = dim
            stack.extend(self._operands(node, dim))
            for user in node.users:
                if user in self.alive and user.op == "call_function" and not is_size(user):
                    through = dim if user.target in _LIKE else self._through(node, dim, user)
                    if through is not None:
                        stack.append((user, through))

    def _operands(self, node: Node, dim: int) -> list[tuple[Node, int]]:
        """Operands that carry the same tokens: keys and values of a self-attention too."""
        found = [(read.operand, read.dim) for read in reads(node, dim) or () if read.operand in self.varying]
        return found + [
            (operand, 2) for operand in _keys_of(node) if same_size(shape_of(operand)[2], shape_of(node)[2])
        ]

    def _through(self, node: Node, dim: int, user: Node) -> int | None:
        if node in _keys_of(user):
            return 2 if dim == 2 and same_size(shape_of(node)[2], shape_of(user)[2]) else None
        return reader_dim(user, node, dim)

    def _find_cuts(self, attention: AttentionSite) -> None:
        graph = self._graph
        graph.add_nodes_from(self.dims)
        for node in self.dims:
            operands = (operand for operand in node.all_input_nodes if operand in self.dims)
            graph.add_edges_from((o, node) for o in operands if values_read(node, o) or node.target in _LIKE)
        sources = [node for node in self.dims if not graph.in_degree(node)]
        if len(sources) != 1:
            named = ", ".join(sorted(node.name for node in sources))
            self._refuse(attention.node, "its tokens come from several streams", streams=named)
            return
        # Cuts are of everything that comes from the tokens, also what has none any more, such as a mean.
        whole, stack = nx.DiGraph(), [sources[0]]
        while stack:
            node = stack.pop()
            for user in node.users:
                if user in self.alive and (user.op == "output" or values_read(user, node) or user.target in _LIKE):
                    stack += [] if user in whole else [user]
                    whole.add_edge(node, user)
        dominators = nx.immediate_dominators(whole, sources[0])
        at: Any = dominators.get(self.view.graph.output_node())
        while at is not None:
            self.cuts += [at] if at in self.dims else []
            at = dominators.get(at) if at is not sources[0] else None
        self.cuts.reverse()

    # ---- blocks

    def block(self, attention: AttentionSite, later: Sequence[AttentionSite], site_id: str) -> BlockSite | Refusal:
        """The block around one attention, which ends where that of the next one begins."""
        view = self.view
        if self.refusal is not None:
            return self.refusal
        if not same_size(attention.queries, attention.keys):
            return view.refuse(attention.node, "queries and keys differ in number")
        start = self._cut_before(attention)
        following = next((other for other in later if other.node in self.dims), None)
        end = self._last_join(attention) if following is None else self._cut_before(following)
        if start is None or end is None:
            which = "before" if start is None else "behind"
            reason = f"no point {which} the attention that everything made of its tokens passes"
            return view.refuse(attention.node, reason, depth=1)
        if self.order[end] < self.order[attention.node]:
            return view.refuse(attention.node, "two self-attentions between two cuts of the stream", depth=2)
        if not (same_shape(shape_of(start), shape_of(end)) and len(shape_of(start)) == 3 and self.dims[start] == 1):
            facts = {"entry": list(shape_of(start)), "exit": list(shape_of(end))}
            return view.refuse(
                attention.node, "entry and exit are not the same [batch, tokens, channels]", depth=3, **facts
            )
        inside = (nx.descendants(self._graph, start) & nx.ancestors(self._graph, end)) | {end}
        reason = self._not_convex(inside, end) or self._mixing(inside, start, attention)
        if reason is not None:
            return reason
        return self._site(attention, site_id, start, end, inside)

    def _cut_before(self, attention: AttentionSite) -> Node | None:
        """The last cut from which the attention's queries, keys and values all come."""
        before = nx.ancestors(self._graph, attention.node)
        return next((cut for cut in reversed(self.cuts) if cut in before), None)

    def _last_join(self, attention: AttentionSite) -> Node | None:
        """The last cut behind an attention where a branch is added to the tokens that went around it."""
        behind = nx.descendants(self._graph, attention.node)
        joins = [c for c in self.cuts if c in behind and is_call(c, aten.add.Tensor) and self._graph.in_degree(c) == 2]
        return joins[-1] if joins else None

    def _not_convex(self, inside: set[Node], end: Node) -> Refusal | None:
        """Paths that leave the tokens of the region and come back; other ways out there are none between two cuts."""
        left: dict[Node, Node] = {}
        for node in self.view.graph.nodes:  # in topological order
            if node not in self.alive or is_size(node):
                continue
            parents = [parent for parent in node.all_input_nodes if values_read(node, parent)]
            if node in inside:
                back = next((parent for parent in parents if parent in left), None)
                if back is not None:
                    facts = {"leaves at": left[back].name, "comes back at": node.name}
                    return self.view.refuse(node, "the block's region is not convex", depth=4, **facts)
                continue
            origin = next((p for p in parents if (p in inside and p is not end) or p in left), None)
            if origin is not None:
                first: Node = origin
                left[node] = left.get(first, first)
        return None

    def _mixing(self, inside: set[Node], start: Node, attention: AttentionSite) -> Refusal | None:
        """Operators inside that do not treat tokens one by one."""
        known = inside | {start}
        for node in sorted(inside, key=self.order.__getitem__):
            named = {(read.operand, read.dim) for read in reads(node, self.dims[node]) or ()}
            if node is attention.node:
                named |= {(operand, 2) for operand in _keys_of(node)}
            for operand in node.all_input_nodes:
                if operand in known and values_read(node, operand) and (operand, self.dims[operand]) not in named:
                    facts = {"operator": str(node.target), "operand": operand.name}
                    return self.view.refuse(node, "the block is not token-wise outside its attention", depth=5, **facts)
        return None

    def _site(self, attention: AttentionSite, site_id: str, start: Node, end: Node, inside: set[Node]) -> BlockSite:
        view, inner = self.view, self._graph.subgraph(inside)
        full: set[Node] = set()
        for operand in (attention.key, attention.value):
            full |= ({operand} | nx.ancestors(inner, operand)) if operand in inside else set()
        dims = {node: self.dims[node] for node in (*inside, start)}
        tables, modulation = self._outside(inside, start, dims)
        linears = [n for n in inside if is_call(n, aten.linear.default)]
        projections = _projections(inner, attention, self.order)
        cross = [n for n in inside if _keys_of(n) and n is not attention.node]
        for node in cross:
            projections |= _projections(inner, node, self.order)

        def ordered(nodes: Any) -> tuple[Node, ...]:
            return tuple(sorted(nodes, key=self.order.__getitem__))

        batch, tokens, channels = shape_of(start)
        return BlockSite(
            id=site_id,
            node=end,
            module_path=_block_path(attention.module_path),
            source=view.source(end),
            entry=start,
            attention=attention,
            cross=ordered(cross),
            linears=ordered(set(linears) - projections),
            modulation=ordered(modulation),
            tables=ordered(tables),
            dims={**dims, **tables},
            full=ordered(full),
            partial=ordered(inside - full),
            tokens=tokens,
            channels=int(channels),
            batch=batch,
        )

    def _outside(self, inside: set[Node], start: Node, dims: Mapping[Node, int]) -> tuple[dict[Node, int], set[Node]]:
        """What the region reads beside its entry: tables of tokens with their dimension, and what has no tokens."""
        tables: dict[Node, int] = {}
        others: set[Node] = set()
        for node in inside:
            named = {read.operand: read.dim for read in reads(node, dims[node]) or ()}
            for operand in node.all_input_nodes:
                if operand in inside or operand is start or is_size(operand):
                    continue
                if operand in named and same_size(sizes_of(operand)[named[operand]], shape_of(start)[1]):
                    tables[operand] = named[operand]
                elif operand in self.varying:
                    others.add(operand)
        return tables, others

    def _refuse(self, node: Node, reason: str, **facts: object) -> None:
        if self.refusal is None:
            self.refusal = self.view.refuse(node, reason, depth=0, **facts)


_LIKE = frozenset({aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default})
"""What is made like tokens belongs to them: it has as many."""


def _keys_of(node: Node) -> Sequence[Node]:
    """Keys and values of an attention, () of anything else."""
    if not is_call(node, aten.scaled_dot_product_attention.default):
        return ()
    values = [node.kwargs.get(name, node.args[place] if len(node.args) > place else None)
              for place, name in ((1, "key"), (2, "value"))]  # fmt: skip
    return [value for value in values if isinstance(value, Node)]


def _projections(inner: Any, attention: AttentionSite | Node, order: Mapping[Node, int]) -> set[Node]:
    """The linears next to an attention: of its operands, and of its output."""
    node = attention.node if isinstance(attention, AttentionSite) else attention
    found: dict[bool, list[Node]] = defaultdict(list)
    for back in (True, False):
        seen, stack = {node}, [node]
        while stack:
            at = stack.pop()
            for other in inner.predecessors(at) if back else inner.successors(at):
                if other in seen:
                    continue
                seen.add(other)
                if is_call(other, aten.linear.default):
                    found[back].append(other)
                else:
                    stack.append(other)
    # Behind the output's projection the residual stream leads on to the next ones.
    output = sorted(found[False], key=order.__getitem__)[:1]
    return {*found[True], *output}


def _varying(view: GraphView) -> set[Node]:
    """The tensors whose values depend on what the program is called with."""
    found: set[Node] = set()
    for node in view.graph.nodes:
        if node.op == "placeholder":
            depends = not view.is_weight(node)
        else:
            constant = node.target in ALIKE and node.target not in _LIKE
            depends = not constant and any(parent in found for parent in node.all_input_nodes)
        if depends and not is_size(node) and isinstance(node.meta.get("val"), Tensor | list | tuple):
            found.add(node)
    return found
