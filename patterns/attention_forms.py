"""Attention in whatever form a graph has it: one SDPA operator, an eager softmax, or fully decomposed matrix products.

    softmax(scale * query @ key^T + offset + mask) @ value

The matcher anchors on the rarest operator (SDPA, softmax) and walks outwards. Which tensor is the query, the key and
the value, whether heads were repeated, and how the batch was folded is proved by evaluating the views in between on
indices (`GraphView.is_layout_of`), so that every way of reshaping is covered by one rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from .attention_scores import MaskTerm, Offset, fill_value, scalar_factor, walk_to_product
from .graph import GraphView, Refusal
from .nodes import CASTS, VIEWS, arguments, aten, first_tensor, is_call, same_size, shape_of

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})


@dataclass(frozen=True)
class Operand:
    """A tensor of the attention, as [batch, heads, tokens, head_dim] (or without the batch), possibly transposed."""

    node: Node
    transposed: bool = False


@dataclass(frozen=True)
class AttentionForm:
    """One attention computation, found in one of its forms.

    Attributes:
        anchor: The SDPA or softmax node.
        output: The node whose value is the attention's output; it is what a rewrite replaces.
        query, key, value: Operands; key and value may have fewer heads (`groups` query heads share one).
        mask: The mask node of SDPA, or the term found before the softmax.
        offset: What is added to the scores besides the mask, as one product with its addend does (`baddbmm`): ALiBi.
        scale: Factor on the scores; None is 1/sqrt(head_dim).
        is_causal: SDPA's own flag.
        groups: Query heads to a key-value head.
    """

    anchor: Node
    output: Node
    query: Operand
    key: Operand
    value: Operand
    mask: MaskTerm | None
    scale: float | None
    is_causal: bool
    groups: int
    offset: Offset | None = None


def match_attention(view: GraphView, anchor: Node) -> AttentionForm | Refusal | None:
    """Match the attention around an SDPA or softmax node.

    Returns:
        The form; a refusal that says which fact failed; None where the node is no anchor.
    """
    if anchor.target is SDPA:
        return _match_sdpa(view, anchor)
    if is_call(anchor, *SOFTMAX):
        return _match_softmax(view, anchor)
    return None


def _match_sdpa(view: GraphView, anchor: Node) -> AttentionForm | Refusal:
    args = arguments(anchor)
    query, key, value = args["query"], args["key"], args["value"]
    if args["dropout_p"] != 0.0:
        return view.refuse(anchor, "attention has dropout", depth=1, dropout_p=args["dropout_p"])
    if not all(len(shape_of(node)) == 4 for node in (query, key, value)):
        return view.refuse(anchor, "attention is not 4-D", depth=1, query=shape_of(query), key=shape_of(key))
    heads = shape_of(query)[1]
    folded = _shared_heads(view, heads, key, value)
    if folded is not None:
        key, value, groups = folded
    else:
        groups = _ratio(heads, shape_of(key)[1]) or 1
    mask = MaskTerm(args["attn_mask"]) if args["attn_mask"] is not None else None
    return AttentionForm(
        anchor,
        anchor,
        Operand(query),
        Operand(key),
        Operand(value),
        mask,
        args["scale"],
        bool(args["is_causal"]),
        groups,
    )


def _shared_heads(view: GraphView, heads: Any, key: Node, value: Node) -> tuple[Node, Node, int] | None:
    """Key and value before their heads were repeated for grouped queries, where both were repeated alike."""
    bases = []
    for node in (key, value):
        for chain in reversed(_chains_back(view, node, scaled=False)):
            base = chain[-1]
            if len(shape_of(base)) != 4 or base is node:
                continue
            groups = _ratio(heads, shape_of(base)[1])
            if groups is None or groups == 1:
                continue
            if view.is_layout_of(node, base, lambda x, g=groups: x.repeat_interleave(g, 1), chain[:-1]):
                bases.append((base, groups))
                break
    if len(bases) == 2 and bases[0][1] == bases[1][1]:
        return bases[0][0], bases[1][0], bases[0][1]
    return None


def _match_softmax(view: GraphView, anchor: Node) -> AttentionForm | Refusal:
    args = arguments(anchor)
    rank = len(shape_of(anchor))
    if args["dim"] not in (-1, rank - 1) or rank not in (3, 4):
        return view.refuse(anchor, "softmax is not over the last of 3 or 4 dimensions", dim=args["dim"], rank=rank)

    scores = walk_to_product(view, args.get("self", args.get("input")), anchor)
    if isinstance(scores, Refusal):
        return scores
    product, mask, scale, offset = scores

    after = _value_product(view, anchor)
    if isinstance(after, Refusal):
        return after
    output, value_side = after

    left, right = product.args[-2:]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    query, query_scale = _operand(view, left, swapped=False)
    key, key_scale = _operand(view, right, swapped=True)
    value, _ = _operand(view, value_side, swapped=False, scaled=False)
    ranks = {len(shape_of(operand.node)) for operand in (query, key, value)}
    if len(ranks) != 1 or (mask is not None and len(shape_of(mask.node)) > ranks.copy().pop()):
        query, key, value = Operand(left), Operand(right, transposed=True), Operand(value_side)
        query_scale = key_scale = 1.0
    if len(shape_of(query.node)) not in (3, 4):
        return view.refuse(anchor, "operands are not 3-D or 4-D", depth=4, query=shape_of(query.node))

    dim = 1 if len(shape_of(query.node)) == 4 else 0
    heads, kv_heads = shape_of(query.node)[dim], shape_of(key.node)[dim]
    groups = _ratio(heads, kv_heads)
    if groups is None or not same_size(kv_heads, shape_of(value.node)[dim]):
        return view.refuse(
            anchor,
            "value heads do not divide query heads",
            depth=5,
            query=heads,
            key=kv_heads,
            value=shape_of(value.node)[dim],
        )
    placed = None if offset is None else _placed(view, offset, mask, rank=len(shape_of(query.node)), heads=heads)
    if isinstance(placed, Refusal):
        return placed
    return AttentionForm(
        anchor,
        output,
        query,
        key,
        value,
        mask,
        scale * query_scale * key_scale,
        is_causal=False,
        groups=groups,
        offset=placed,
    )


def _placed(view: GraphView, offset: Node, mask: MaskTerm | None, *, rank: int, heads: Any) -> Offset | Refusal:
    """How the addend of a product [batch * heads, queries, keys] lies over scores of `rank` dimensions."""
    sizes = shape_of(offset)
    if rank == 3 and mask is not None and len(shape_of(mask.node)) > 3:
        return view.refuse(offset, "scores are offset in another layout than they are masked in", depth=5)
    if rank == 3 or len(sizes) < 3 or same_size(sizes[0], 1):
        return Offset(offset)
    if not isinstance(heads, int):
        return view.refuse(offset, "scores of a dynamic number of heads are offset", depth=5)
    return Offset(offset, heads)


def _value_product(view: GraphView, anchor: Node) -> tuple[Node, Node] | Refusal:
    """Walk forward from the softmax to its product with the value: (output, value operand)."""
    node = anchor
    for _ in range(12):
        # The guard against fully masked rows reads the probabilities' shape, not their values.
        users = [user for user in node.users if not is_call(user, aten.full_like.default, aten.zeros_like.default)]
        if len(users) != 1:
            reason = "attention probabilities are used outside" if users else "attention probabilities are not used"
            return view.refuse(node, reason, depth=3, users=", ".join(user.name for user in users))
        user = users[0]
        if user.op == "output":
            return view.refuse(node, "attention probabilities are returned", depth=3)
        if is_call(user, aten.matmul.default, aten.bmm.default) and user.args[0] is node:
            value = user.args[1]
            assert isinstance(value, Node)
            return user, value
        guard = is_call(user, aten.where.self) and user.args[2] is node and fill_value(view, user.args[1]) == 0.0
        if guard or (is_call(user, *CASTS, *VIEWS) and user.args[0] is node):
            node = user
            continue
        if is_call(user, aten.dropout.default, aten.native_dropout.default):
            return view.refuse(user, "attention has dropout", depth=3)
        return view.refuse(
            user, "attention probabilities are not multiplied by a value", depth=3, operator=str(user.target)
        )
    return view.refuse(anchor, "no matrix product after the softmax", depth=3)


def _operand(view: GraphView, node: Node, *, swapped: bool, scaled: bool = True) -> tuple[Operand, float]:
    """The earliest tensor [B, heads, tokens, D] that a product's operand is a view of, and the factor in between.

    Args:
        view: The graph.
        node: The operand, [..., tokens, D], or [..., D, tokens] where `swapped`.
        swapped: Whether the operand is the transposed key.
        scaled: Whether constant factors may be taken out.
    """
    chains = _chains_back(view, node, scaled=scaled)
    for rank in (4, 3):
        for chain in reversed(chains):
            base = chain[-1]
            if len(shape_of(base)) != rank:
                continue
            factor = 1.0
            for step in chain[:-1]:
                taken = scalar_factor(view, step)
                factor *= taken[1] if taken else 1.0

            def expected(x: Tensor, like: Node = node, rank: int = rank) -> Tensor:
                x = x.transpose(-1, -2) if swapped else x
                dims = len(shape_of(like))
                flat = [int(size) if isinstance(size, int) else -1 for size in shape_of(like)[:-2]]
                heads = x.shape[rank - 3]
                wanted = shape_of(like)[rank - 3] if dims == rank else None
                groups = wanted // heads if isinstance(wanted, int) and heads and wanted % heads == 0 else 1
                x = x.repeat_interleave(groups, rank - 3) if groups > 1 else x
                if dims == 3 and rank == 4:
                    known = flat[0]
                    groups = known // (x.shape[0] * heads) if known > 0 else 1
                    x = (x.repeat_interleave(groups, 1) if groups > 1 else x).flatten(0, 1)
                return x

            if view.is_layout_of(node, base, expected, chain[:-1]):
                return Operand(base), factor
    return Operand(node, transposed=swapped), 1.0


def _chains_back(view: GraphView, node: Node, *, scaled: bool) -> list[Sequence[Node]]:
    """Chains from a node back to each ancestor that it is a view of (constant factors and casts stepped over)."""
    chain = [node]
    chains: list[Sequence[Node]] = [tuple(chain)]
    while len(chain) < 16:
        factor = scalar_factor(view, node) if scaled else None
        if factor is not None:
            node = factor[0]
        elif is_call(node, *VIEWS) or (scaled and is_call(node, *CASTS)):
            node = first_tensor(node)
        else:
            break
        chain.append(node)
        chains.append(tuple(chain))
    return chains


def _ratio(heads: Any, kv_heads: Any) -> int | None:
    """Query heads to a key-value head, where that is a whole number."""
    if isinstance(heads, int) and isinstance(kv_heads, int):
        return heads // kv_heads if kv_heads and heads % kv_heads == 0 else None
    return 1 if same_size(heads, kv_heads) else None
