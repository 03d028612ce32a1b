"""The journal of one transaction on a graph, and how it is taken back.

A redirection is noted by argument, not by user: `add(a, b)` may have read the replacement of `a` already, as its `b`.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from ..errors import VerificationError


@dataclass
class Change:
    """What one transaction did, so that it can be taken back."""

    label: str
    added: list[Node] = field(default_factory=list)
    redirected: list[tuple[Node, Node, dict[Node, frozenset[int]]]] = field(default_factory=list)
    """(old, new, who reads `new` instead: user -> which of its arguments, counted as nodes from the left)."""
    kept: list[tuple[Node, Node, dict[Node, frozenset[int]]]] = field(default_factory=list)
    """The same for values that are kept from call to call: the user is the graph's output."""
    restores: list[Callable[[], None]] = field(default_factory=list)
    """What puts the signature back."""
    undone: bool = False

    def undo(self) -> None:
        """Restore the graph to what it was before this change.

        Raises:
            VerificationError: A later change builds on a node that this one added.
        """
        if self.undone:
            return
        self._refuse_if_built_on()
        for old, new, users in (*reversed(self.kept), *reversed(self.redirected)):
            for user, positions in users.items():
                redirect(user, new, old, positions)
        for restore in reversed(self.restores):
            restore()
        for node in reversed(self.added):
            if node.op != "placeholder" and not node.users:
                node.graph.erase_node(node)
        self.undone = True

    def _refuse_if_built_on(self) -> None:
        mine = set(self.added)
        restored: dict[Node, set[int]] = {}
        for _, _, users in (*self.redirected, *self.kept):
            for user, positions in users.items():
                restored.setdefault(user, set()).update(positions)
        for node in reversed(self.added):
            for user in node.users:
                # What stays behind of an undone change is its buffers: others may go on using them.
                if user in mine or node.op == "placeholder":
                    continue
                if not positions_of(user, node) <= restored.get(user, set()):
                    raise VerificationError(f"{self.label}: {user.name} builds on {node.name}, which is to be undone")


def positions_of(user: Node, node: Node) -> frozenset[int]:
    """At which of its arguments, counted as nodes from the left, a user reads a node."""
    return frozenset(position for position, argument in enumerate(_node_arguments(user)) if argument is node)


def redirect(user: Node, old: Node, new: Node, positions: Set[int]) -> None:
    """Let a user read `new` at those of the positions at which it reads `old`."""
    counter = count()

    def swapped(argument: Node) -> Node:
        return new if next(counter) in positions and argument is old else argument

    arguments: Any = map_arg((user.args, user.kwargs), swapped)
    user.args, user.kwargs = arguments


def _node_arguments(user: Node) -> list[Node]:
    found: list[Node] = []
    map_arg((user.args, user.kwargs), lambda argument: found.append(argument) or argument)
    return found
