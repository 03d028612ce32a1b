"""The modules of a graph as a tree of groups, and the layers in which the members of each group are drawn.

A group has few members, so that opening one is quick: what a module has too many of is split into runs of neighbours.
Layers are topological generations of the group's members, computed with networkx.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import networkx as nx

MOST_MEMBERS = 40
"""Members that a group may have: dagre lays so many out in less than 50 ms."""

FEWEST_MEMBERS = 3
"""Nodes up to which a module without modules of its own is no group: a linear, before and after it was rewritten."""


@dataclass
class Group:
    """A module, or a run of neighbours in one.

    Attributes:
        label: What is written on it: the path below the parent's.
        path: The module path, "" of the whole graph; a run has its module's.
        parent: Index of the parent, -1 of the whole graph.
        members: Indices of nodes as they are, of groups as -1 - index, in graph order.
        layer: In which layer of its parent it is drawn.
    """

    label: str
    path: str
    parent: int
    members: list[int] = field(default_factory=list)
    layer: int = 0


@dataclass
class Tree:
    """The groups, the whole graph first; for each node its group and its layer in it."""

    groups: list[Group]
    parents: list[int]
    layers: list[int]


def group_nodes(names: list[str], modules: list[str], edges: Iterable[tuple[int, int]]) -> Tree:
    """Group nodes by the module that they came from.

    Args:
        names: Of the nodes, in graph order.
        modules: Their module paths, "" where unknown.
        edges: (from, to), indices of nodes.

    Returns:
        The tree; every node has a group and a layer.
    """
    groups = [Group("", "", -1)]
    index = {"": 0}
    parents = [_group(groups, index, path) for path in modules]
    position: dict[int, int] = {}
    for node, parent in enumerate(parents):
        groups[parent].members.append(node)
        while parent >= 0 and parent not in position:
            position[parent] = node
            parent = groups[parent].parent
    for number, group in enumerate(groups[1:], 1):
        groups[group.parent].members.append(-1 - number)
    for group in groups:
        group.members.sort(key=lambda member: member if member >= 0 else position[-1 - member] - 0.5)
    _simplify(groups)
    for number in range(len(groups)):
        _split(groups, number, names)
    tree = _renumbered(groups, len(names))
    _set_layers(tree, edges)
    return tree


def _group(groups: list[Group], index: dict[str, int], path: str) -> int:
    if path not in index:
        above, _, last = path.rpartition(".")
        parent = _group(groups, index, above)
        index[path] = len(groups)
        # A number says little alone: `layers.7`.
        label = f"{above.rpartition('.')[2]}.{last}" if last.isdigit() and above else last
        groups.append(Group(label, path, parent))
    return index[path]


def _simplify(groups: list[Group]) -> None:
    """Draw a module that holds nothing but one other as one with it, and the few nodes of a small one in its parent.

    Groups that are left out keep their place in the list; nothing leads to them any more.
    """
    for number in reversed(range(1, len(groups))):  # a child comes after its parent
        group = groups[number]
        if len(group.members) == 1 and group.members[0] < 0:
            only = groups[-1 - group.members[0]]
            group.label, group.path, group.members = f"{group.label}.{only.label}", only.path, only.members
        if len(group.members) <= FEWEST_MEMBERS and min(group.members) >= 0:
            above = groups[group.parent].members
            place = above.index(-1 - number)
            above[place : place + 1] = group.members


def _split(groups: list[Group], number: int, names: list[str]) -> None:
    while len(groups[number].members) > MOST_MEMBERS:
        members, runs = groups[number].members, []
        for start in range(0, len(members), MOST_MEMBERS):
            run = members[start : start + MOST_MEMBERS]
            if len(run) == 1:
                runs += run
                continue
            label = f"{_label(groups, run[0], names)} … {_label(groups, run[-1], names)}"
            runs.append(-1 - len(groups))
            groups.append(Group(label, groups[number].path, number, run))
        groups[number].members = runs


def _label(groups: list[Group], member: int, names: list[str]) -> str:
    if member >= 0:
        return names[member]
    label = groups[-1 - member].label
    return label.partition(" … ")[0]


def _renumbered(groups: list[Group], nodes: int) -> Tree:
    """Groups that are reached from the first, in that order; those that were merged away are left out."""
    order, parents = [0], [0] * nodes
    number = {0: 0}
    for old in order:
        for member in groups[old].members:
            if member < 0:
                number[-1 - member] = len(order)
                groups[-1 - member].parent = number[old]
                order.append(-1 - member)
            else:
                parents[member] = number[old]
    kept = [groups[old] for old in order]
    for group in kept:
        group.members = [member if member >= 0 else -1 - number[-1 - member] for member in group.members]
    return Tree(kept, parents, [0] * nodes)


def _set_layers(tree: Tree, edges: Iterable[tuple[int, int]]) -> None:
    inside = [nx.DiGraph() for _ in tree.groups]
    for graph, group in zip(inside, tree.groups, strict=True):
        graph.add_nodes_from(group.members)
    above = [_ancestors(tree, number) for number in range(len(tree.groups))]
    for source, target in edges:
        first, second = above[tree.parents[source]], above[tree.parents[target]]
        common = 0
        for a, b in zip(first, second, strict=False):
            if a != b:
                break
            common += 1
        group = first[common - 1]
        a = -1 - first[common] if common < len(first) else source
        b = -1 - second[common] if common < len(second) else target
        if a != b:
            inside[group].add_edge(a, b)
    for graph in inside:
        for member, layer in layers_of(graph).items():
            if member >= 0:
                tree.layers[member] = layer
            else:
                tree.groups[-1 - member].layer = layer


def _ancestors(tree: Tree, number: int) -> list[int]:
    chain = [number]
    while chain[-1]:
        chain.append(tree.groups[chain[-1]].parent)
    return chain[::-1]


def layers_of(graph: nx.DiGraph) -> Mapping[int, int]:
    """Topological generations; what is in a circle shares one, and what nothing leads to stands above its first reader.

    Args:
        graph: The members of one group. Modules that call each other may form circles.
    """
    condensed = nx.condensation(graph)
    layer = {part: number for number, parts in enumerate(nx.topological_generations(condensed)) for part in parts}
    for part in condensed.nodes:
        readers = [layer[reader] for reader in condensed.successors(part)]
        if readers and not any(True for _ in condensed.predecessors(part)):
            layer[part] = min(readers) - 1
    return {member: layer[part] for part, data in condensed.nodes(data=True) for member in data["members"]}
