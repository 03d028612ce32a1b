"""Attention sites of a canonical program, with the facts that a method needs to choose a variant.

In the canonical dialect attention is one SDPA node. What is proved here: what the mask is, whether queries and keys
come from the same tokens (self), from other tokens (cross) or from two token streams joined (joint), and how heads are
grouped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.fx import Node

from .attention_forms import SDPA, SOFTMAX, match_attention
from .graph import GraphView, Refusal
from .masks import MaskFact, analyse_mask
from .nodes import VIEWS, arguments, aten, dtype_of, is_call, is_size, same_size, shape_of
from .site import Found, Ordinals, Site

AttentionKind = Literal["self", "cross", "joint"]


@dataclass(frozen=True, eq=False)  # Comparing dynamic sizes would add a guard to the program.
class AttentionSite(Site):
    """One scaled dot-product attention.

    Attributes:
        query: [batch, heads, queries, head_dim].
        key, value: [batch, kv_heads, keys, head_dim].
        mask: What the mask was proved to be.
        attention: "self", "cross", or "joint" where two token streams were concatenated.
        scale: Factor on the scores; None is 1/sqrt(head_dim).
    """

    kind: ClassVar[str] = "attention"

    query: Node
    key: Node
    value: Node
    mask_node: Node | None
    mask: MaskFact
    attention: AttentionKind
    scale: float | None
    heads: int
    kv_heads: int
    head_dim: int
    queries: Any
    keys: Any

    def describe(self) -> dict[str, str]:
        """Facts for tables."""
        grouped = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else str(self.heads)
        window = f" window {self.mask.window}" if self.mask.window is not None else ""
        return {
            "attention": self.attention,
            "heads": grouped,
            "head_dim": str(self.head_dim),
            "tokens": f"{self.queries} x {self.keys}",
            "mask": f"{self.mask.kind}{window}",
            "dtype": str(dtype_of(self.query)).removeprefix("torch."),
        }


def find_attention(view: GraphView, phase: str = "main") -> Found[AttentionSite]:
    """Find every attention of a canonical program.

    A softmax that is left in the graph is a near miss: the refusal says which fact kept it from being attention.
    """
    sites: list[AttentionSite] = []
    refusals: list[Refusal] = []
    ordinals = Ordinals(phase)
    for node in view.graph.nodes:
        if is_call(node, *SOFTMAX):
            form = match_attention(view, node)
            if isinstance(form, Refusal):
                refusals.append(form)
        if not is_call(node, SDPA):
            continue
        # Refused anchors count too, so that ids stay equal in phases that accept them.
        site_id = ordinals.next_id(view.module_path(node), AttentionSite.kind)
        form = match_attention(view, node)
        if isinstance(form, Refusal):
            refusals.append(form)
            continue
        args = arguments(node)
        query, key, value = args["query"], args["key"], args["value"]
        heads, kv_heads, head_dim = shape_of(query)[1], shape_of(key)[1], shape_of(query)[3]
        if not all(isinstance(size, int) for size in (heads, kv_heads, head_dim)):
            refusals.append(view.refuse(node, "heads or head_dim are dynamic", depth=2, heads=heads, head_dim=head_dim))
            continue
        queries, keys = shape_of(query)[2], shape_of(key)[2]
        mask = analyse_mask(view, args["attn_mask"], queries, keys, is_causal=bool(args["is_causal"]))
        sites.append(
            AttentionSite(
                id=site_id,
                node=node,
                module_path=view.module_path(node),
                source=view.source(node),
                query=query,
                key=key,
                value=value,
                mask_node=args["attn_mask"],
                mask=mask,
                attention=_attention_kind(query, key, queries, keys),
                scale=args["scale"],
                heads=int(heads),
                kv_heads=int(kv_heads),
                head_dim=int(head_dim),
                queries=queries,
                keys=keys,
            )
        )
    return Found(tuple(sites), tuple(refusals))


def _attention_kind(query: Node, key: Node, queries: Any, keys: Any) -> AttentionKind:
    """Self attention projects queries and keys from one hidden tensor; joint attention joins two streams first."""
    if _is_joined(query, queries) and _is_joined(key, keys):
        return "joint"
    query_sources, key_sources = _projected_from(query), _projected_from(key)
    if query_sources & key_sources:
        return "self"
    return "cross" if query_sources and key_sources else ("self" if same_size(queries, keys) else "cross")


def _is_joined(node: Node, tokens: Any) -> bool:
    """Whether two streams of tokens are concatenated on the way to this operand."""
    for _ in range(24):
        if is_call(node, aten.cat.default):
            parts, dim = arguments(node)["tensors"], arguments(node)["dim"]
            rank = len(shape_of(node))
            sizes = shape_of(node)
            token_dim = dim % rank if rank else dim
            if len(parts) == 2 and token_dim not in (rank - 1,) and same_size(sizes[token_dim], tokens):
                return all(not is_call(part, aten.slice.Tensor) for part in parts)
            return False
        if not (is_call(node, *VIEWS) and isinstance(node.args[0], Node)):
            return False
        node = node.args[0]
    return False


def _projected_from(node: Node) -> set[Node]:
    """The tensors that are projected by a linear to make this operand."""
    seen: set[Node] = set()
    stack, found = [node], set()
    while stack and len(seen) < 200:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_call(current, aten.linear.default, aten.addmm.default):
            source = current.args[0] if current.target is aten.linear.default else current.args[1]
            assert isinstance(source, Node)
            while is_call(source, *VIEWS):
                source = source.args[0]
                assert isinstance(source, Node)
            found.add(source)
            continue
        stack.extend(parent for parent in current.all_input_nodes if not is_size(parent))
    return found
