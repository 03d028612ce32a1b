"""Scale the channels of an activation where it is made, and what reads it the other way: exact.

    h ── norm(g) ── linear(W)              becomes     h ── norm(g s) ── linear(W diag(1/s))           `widen_norm`
    act(a) · linear(Wu, b) ── linear(Wd)   becomes     act(a) · linear(diag(s) Wu, s b) ── linear(Wd diag(1/s))
                                                                                                       `widen_up`

Nothing is added to the graph. All that reads a norm is rescaled, so what is no linear with a stored weight is refused.
Weights are computed in float64 and rounded once; exact up to that rounding.

Source: the scale of SmoothQuant (Xiao et al. 2023, arXiv:2211.10438), which Outstanding-sparse (arXiv:2508.02128) turns
round, so that activations get wider and magnitudes tell channels apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from ..patterns.flow import LINEAR
from ..patterns.graph import GraphView, Refusal
from ..patterns.linear import LinearSite
from ..patterns.nodes import arguments, aten, is_call
from ..patterns.norm import LAYER_NORM, NormSite
from ..patterns.residual import is_size_query, live_nodes
from .base import SitePass
from .edit import Edit


@dataclass(frozen=True)
class WidenNorm(SitePass[NormSite]):
    """A norm's output times s, its readers' columns divided by it.

    Attributes:
        scale: Name of the profile's tensor s [size], positive.
    """

    name: ClassVar[str] = "widen_norm"
    exact: ClassVar[bool] = True
    ensures: ClassVar[str] = "canonical"

    scale: str = ""

    def guard(self, site: NormSite, edit: Edit) -> str | None:
        """A stored gain, linears alone that read it, and a scale that fits."""
        readers = norm_readers(edit.view, site)
        if isinstance(readers, Refusal):
            return str(readers)
        return scale_reason(edit, self.scale, site.size)

    def rewrite(self, site: NormSite, edit: Edit) -> None:
        """Make gain, shift and weights anew."""
        readers = norm_readers(edit.view, site)
        assert not isinstance(readers, Refusal)
        scale, mark = edit.shared[self.scale], self.scale
        now = edit.current(site.node)
        args = arguments(now)
        stored = {name: args.get(name) for name in ("weight", "bias")}
        scaled = {
            name: None if node is None else _scaled(edit, node, mark, lambda t: t * scale.double().to(t.device))
            for name, node in stored.items()
        }
        rest = (args["normalized_shape"], scaled["weight"])
        if now.target is LAYER_NORM:
            wide = edit.call(now.target, args["input"], *rest, scaled["bias"], args["eps"], like=now)
        else:
            wide = edit.call(now.target, args["input"], *rest, args["eps"], like=now)
        for linear in readers:
            _divide_columns(edit, linear, wide, scale, mark)


@dataclass(frozen=True)
class WidenUp(SitePass[LinearSite]):
    """A gated product times s, by the rows of its linear factor; the columns of what reads it divided by s.

    Attributes:
        scale: Name of the profile's tensor s [in_features], positive.
    """

    name: ClassVar[str] = "widen_up"
    exact: ClassVar[bool] = True
    ensures: ClassVar[str] = "canonical"

    scale: str = ""

    def guard(self, site: LinearSite, edit: Edit) -> str | None:
        """A product of which one factor is a linear that nothing else reads, and a scale that fits."""
        factor = linear_factor(edit.view, site)
        if isinstance(factor, Refusal):
            return str(factor)
        return scale_reason(edit, self.scale, site.in_features)

    def rewrite(self, site: LinearSite, edit: Edit) -> None:
        """Make both weights anew."""
        factor = linear_factor(edit.view, site)
        assert not isinstance(factor, Refusal)
        scale, mark = edit.shared[self.scale], self.scale
        now = edit.current(factor)
        args = arguments(now)

        def rows(tensor: Tensor) -> Tensor:
            wide = scale.double().to(tensor.device)
            return tensor * (wide[:, None] if tensor.dim() == 2 else wide)

        weight = _scaled(edit, args["weight"], mark, rows)
        bias = [] if args["bias"] is None else [_scaled(edit, args["bias"], mark, rows)]
        edit.replace(factor, edit.call(LINEAR, args["input"], weight, *bias, like=factor))
        _divide_columns(edit, site.node, site.input, scale, mark)


def norm_readers(view: GraphView, site: NormSite) -> tuple[Node, ...] | Refusal:
    """The linears that read a norm; refused where it has no stored gain, or where anything else reads it."""
    node = site.node
    if site.weight is None or not view.is_weight(site.weight) or site.gain_offset:
        return view.refuse(node, "the norm has no stored gain")
    alive, readers = live_nodes(view), []
    for user in node.users:
        if user not in alive or is_size_query(user):
            continue
        weight = user.args[1] if is_call(user, LINEAR) else None
        if not isinstance(weight, Node) or user.args[0] is not node or not view.is_weight(weight):
            return view.refuse(node, "the norm is read by something that is no linear", reader=user.name)
        readers.append(user)
    return tuple(readers) or view.refuse(node, "nothing reads the norm")


def linear_factor(view: GraphView, site: LinearSite) -> Node | Refusal:
    """The linear whose output is one factor of what a site reads, and is read by that product alone."""
    product, alive = site.input, live_nodes(view)
    if not is_call(product, aten.mul.Tensor):
        return view.refuse(site.node, "its input is no gated product", operator=str(product.target))
    if [user for user in product.users if user in alive and not is_size_query(user)] != [site.node]:
        return view.refuse(site.node, "something else reads its input")
    for factor in product.args:
        if not isinstance(factor, Node) or not is_call(factor, LINEAR):
            continue
        weight = factor.args[1]
        others = [user for user in factor.users if user in alive and user is not product and not is_size_query(user)]
        if (
            isinstance(weight, Node)
            and view.is_weight(weight)
            and not others
            and factor.meta["val"].shape[-1:] == (product.meta["val"].shape[-1],)
        ):
            return factor
    return view.refuse(site.node, "no factor of its input is a linear that nothing else reads")


def scale_reason(edit: Edit, name: str, size: int) -> str | None:
    """Why a tensor of the profile is no scale for so many channels, or None."""
    stored = edit.shared.get(name)
    if stored is None:
        return f"the profile has no tensor {name}"
    if tuple(stored.shape) != (size,) or not stored.is_floating_point():
        return f"{name} is {stored.dtype}{list(stored.shape)}, expected a float tensor {[size]}"
    return None if bool((stored > 0).all()) and bool(stored.isfinite().all()) else f"{name} is not positive"


def _divide_columns(edit: Edit, linear: Node, source: Node, scale: Tensor, mark: str) -> None:
    args = arguments(edit.current(linear))
    weight = _scaled(edit, args["weight"], mark, lambda t: t / scale.double().to(t.device))
    bias = [] if args["bias"] is None else [args["bias"]]
    edit.replace(linear, edit.call(LINEAR, source, weight, *bias, like=linear))


def _scaled(edit: Edit, stored: Node, mark: str, change: Callable[[Tensor], Tensor]) -> Node:
    """A stored tensor changed in float64; the mark of the scale tells apart what a shared weight becomes."""
    tensor = edit.constant(stored).detach()
    return edit.buffer(f"{edit.view.target(stored)}.{mark}", lambda: change(tensor.double()).to(tensor.dtype))
