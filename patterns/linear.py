"""Linear layers with a stored weight, and the part that each plays in its block.

x ── linear(W[out, in], b) ── y
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from .flow import LINEAR
from .graph import GraphView, Refusal
from .linear_roles import Role, linear_roles
from .nodes import CASTS, aten, dtype_of, is_call, shape_of
from .site import Found, Ordinals, Site


@dataclass(frozen=True)
class LinearSite(Site):
    """One `aten.linear` with a stored weight.

    Attributes:
        input: [..., in_features].
        weight: Placeholder of the weight, [out_features, in_features].
        bias: [out_features], or None.
        weight_name: Fully qualified name of the weight.
        role: What the linear is for, from dataflow.
        shared_weight: Whether other nodes read the weight too, as with a tied embedding.
    """

    kind: ClassVar[str] = "linear"

    input: Node
    weight: Node
    bias: Node | None
    weight_name: str
    in_features: int
    out_features: int
    role: Role
    shared_weight: bool

    def describe(self) -> dict[str, str]:
        """Facts for tables."""
        tokens = " x ".join(str(size) for size in shape_of(self.input)[:-1])
        return {
            "role": self.role,
            "features": f"{self.in_features} -> {self.out_features}",
            "tokens": tokens or "1",
            "bias": "yes" if self.bias is not None else "no",
            "weight": self.weight_name + (" (shared)" if self.shared_weight else ""),
            "dtype": str(dtype_of(self.input)).removeprefix("torch."),
        }


def find_linears(view: GraphView, phase: str = "main") -> Found[LinearSite]:
    """Find every linear of a functional program.

    Refused, with the fact: a weight that is computed, an input, a state or not 2-D; and matrix products that read a
    weight directly, since it is stored transposed (transformers' `Conv1D`).
    """
    sites: list[LinearSite] = []
    refusals: list[Refusal] = []
    ordinals = Ordinals(phase)
    roles = linear_roles(view)
    for node in view.graph.nodes:
        if not is_call(node, LINEAR):
            refusal = _refuse_product(view, node)
            if refusal is not None:
                refusals.append(refusal)
            continue
        site_id = ordinals.next_id(view.module_path(node), LinearSite.kind)
        source, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        assert isinstance(source, Node)
        assert isinstance(weight, Node)
        refusal = _refuse_weight(view, node, weight)
        if refusal is not None:
            refusals.append(refusal)
            continue
        name = view.target(weight)
        assert name is not None
        out_features, in_features = shape_of(weight)
        sites.append(
            LinearSite(
                id=site_id,
                node=node,
                module_path=view.module_path(node),
                source=view.source(node),
                input=source,
                weight=weight,
                bias=bias if isinstance(bias, Node) else None,
                weight_name=name,
                in_features=int(in_features),
                out_features=int(out_features),
                role=roles[node],
                shared_weight=len(weight.users) > 1,
            )
        )
    return Found(tuple(sites), tuple(refusals))


def _refuse_weight(view: GraphView, node: Node, weight: Node) -> Refusal | None:
    if weight.op != "placeholder":
        return view.refuse(node, "computed weight", depth=1, operator=str(weight.target))
    if view.is_state(weight):
        return view.refuse(node, "weight is state", depth=2, buffer=view.target(weight))
    if not view.is_weight(weight):
        return view.refuse(node, "weight is an input of the call", depth=2, input=weight.name)
    if len(shape_of(weight)) != 2:
        return view.refuse(node, "weight is not 2-D", depth=3, weight=view.target(weight), shape=list(shape_of(weight)))
    return None


_PRODUCTS = {aten.mm.default: 1, aten.matmul.default: 1, aten.bmm.default: 1, aten.addmm.default: 2}
"""Matrix products, and the position of their right factor."""
_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)


def _refuse_product(view: GraphView, node: Node) -> Refusal | None:
    """Why a matrix product with a stored right factor is no linear; None for any other node."""
    if not is_call(node, *_PRODUCTS):
        return None
    factor = node.args[_PRODUCTS[node.target]]  # pyright: ignore[reportArgumentType]
    transposed = False
    while is_call(factor, *_TRANSPOSES, *CASTS):
        assert isinstance(factor, Node)
        transposed = transposed or factor.target in _TRANSPOSES
        factor = factor.args[0]
    if not isinstance(factor, Node) or not view.is_weight(factor):
        return None
    facts = {"weight": view.target(factor), "shape": list(shape_of(factor))}
    if len(shape_of(factor)) != 2:
        return view.refuse(node, "weight is not 2-D", depth=1, **facts)
    if transposed:
        return view.refuse(node, "matrix product is not raised to a linear", depth=1, **facts)
    return view.refuse(node, "weight is stored transposed", depth=1, **facts)
