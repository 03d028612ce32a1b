"""What part each linear plays, read from where its values flow and never from names.

The flow of an attention's operands shows q, k and v; that of a linear's input shows o and down, and the gate and up
that feed it; that of the outputs shows the head.
"""

from __future__ import annotations

from typing import Literal

from torch.export.graph_signature import OutputKind
from torch.fx import Node

from .flow import LINEAR, MATRIX_PRODUCTS, Flow, Flows
from .graph import GraphView
from .nodes import CASTS, RESHAPES, aten, is_call, strip

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "head", "other"]


def linear_roles(view: GraphView) -> dict[Node, Role]:
    """The role of every `aten.linear` of a functional program.

    - q, k, v: the output reaches that operand of an attention; qkv where it reaches several.
    - o: the input is an attention's output, possibly gated.
    - up, down: `down(act(up(x)))`.
    - gate, up, down: `down(act(gate(x)) * up(x))`; gate_up where one linear is split into both.
    - head: no matrix product follows on the way to an output, and the input is not gated.
    - other: anything else.
    """
    flows = Flows(view)
    linears = [node for node in view.graph.nodes if is_call(node, LINEAR)]
    roles = _operand_roles(flows)
    gated: set[Node] = set()
    for linear in linears:
        flow = flows[_input(linear)]
        units: dict[Node, Role] = {root: role for root, role in _hidden_units(flow).items() if root not in roles}
        roles.update(units)
        if linear in roles:
            continue
        if any(origin.root in flows.attentions for origin in flow):
            roles[linear] = "o"
        elif units:
            roles[linear] = "down"
            if len(units) > 1 or "gate_up" in units.values():
                gated.add(linear)
    for linear in _last_linears(view, flows):
        if roles.get(linear, "down") == "down" and linear not in gated:
            roles[linear] = "head"
    return {linear: roles.get(linear, "other") for linear in linears}


def _operand_roles(flows: Flows) -> dict[Node, Role]:
    """Linears that make an attention's query, key or value."""
    uses: dict[Node, set[Role]] = {}
    letters: tuple[Role, ...] = ("q", "k", "v")
    for operands in flows.attentions.values():
        for letter, operand in zip(letters, operands, strict=True):
            for origin in flows[operand]:
                if is_call(origin.root, LINEAR):
                    uses.setdefault(origin.root, set()).add(letter)
    return {linear: next(iter(found)) if len(found) == 1 else "qkv" for linear, found in uses.items()}


def _hidden_units(flow: Flow) -> dict[Node, Role]:
    """The linears that make a hidden layer of this flow: gate and up, both in one, or up alone before an activation."""
    units: dict[Node, Role] = {}
    for (root, _), trace in flow.items():
        if not is_call(root, LINEAR):
            continue
        partners = {factor.root for factor in trace.factors}
        if not partners:
            if trace.activated:
                units.setdefault(root, "up")
        elif all(is_call(partner, LINEAR) and _source(partner) is _source(root) for partner in partners):
            if root in partners:
                units[root] = "gate_up"
            else:
                units.setdefault(root, "gate" if trace.activated else "up")
    return units


def _last_linears(view: GraphView, flows: Flows) -> list[Node]:
    """Linears that reach an output of the call, with no matrix product after them on any way."""
    followed: set[Node] = set()
    for node in reversed(view.graph.nodes):
        if any(user.target in MATRIX_PRODUCTS or user in followed for user in node.users):
            followed.add(node)
    (returned,) = view.graph.output_node().args
    assert isinstance(returned, list | tuple)
    result = []
    for node, spec in zip(returned, view.exported.graph_signature.output_specs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(node, Node):
            roots = dict.fromkeys(origin.root for origin in flows[node])
            result += [root for root in roots if is_call(root, LINEAR) and root not in followed]
    return result


def _input(linear: Node) -> Node:
    source = linear.args[0]
    assert isinstance(source, Node)
    return source


def _source(linear: Node) -> Node:
    """Where a linear is fed from, reshapes, copies and casts stepped over."""
    return strip(_input(linear), RESHAPES | CASTS | {aten.clone.default})
