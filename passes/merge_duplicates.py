"""Merge calls that compute the same thing (common subexpression elimination).

    a = cos(x);  b = cos(x);  a + b        becomes        a = cos(x);  a + a

Only deterministic operators are merged, and only calls with equal arguments. Exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from .base import Pass, PassResult
from .edit import ASSERTS, Edit


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Keep the first of equal calls."""

    name: ClassVar[str] = "merge_duplicates"
    after: ClassVar[tuple[str, ...]] = (
        "drop_noops",
        "raise_linear",
        "raise_rms_norm",
        "raise_attention",
        "prove_masks",
    )

    def run(self, edit: Edit) -> PassResult:
        """Walk forward once; equal inputs have been merged by the time their users are met."""
        first: dict[Any, Node] = {}
        changed = 0
        for node in list(edit.graph.nodes):
            if node.op != "call_function" or node.target in ASSERTS or _is_random(node):
                continue
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            known = first.setdefault(key, node)
            if known is not node:
                edit.replace(node, known)
                changed += 1
        return PassResult(changed)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _frozen(value: Any) -> Any:
    """A hashable key; 1, 1.0 and True are different arguments."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    if isinstance(value, Node):
        return value
    return (type(value), repr(value))
