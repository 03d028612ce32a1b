"""Specialise a dynamic program to fixed sizes: what was a symbol becomes a number, everywhere.

    input_ids [1, s]  ── sym_size ── arange(s) ── y [1, s]       becomes       input_ids [1, 1] ── arange(1) ── y [1, 1]

No retrace: every node's metadata is recomputed on fake tensors of the new sizes, so module paths and source lines stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from ..errors import InvalidArgument, InvalidType
from ..patterns.nodes import concrete, free_symbols
from ..torch_private import pytree
from .base import Pass, PassResult
from .edit import Edit


@dataclass(frozen=True)
class FixSizes(Pass):
    """Fix lengths of inputs.

    Attributes:
        sizes: Input name -> dimension -> length.
    """

    name: ClassVar[str] = "fix_sizes"
    exact: ClassVar[bool] = False  # The example inputs change with the sizes.
    requires: ClassVar[str] = "canonical"
    ensures: ClassVar[str] = "exported"

    sizes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def run(self, edit: Edit) -> PassResult:
        """Substitute the symbols in one forward walk.

        Raises:
            InvalidArgument: No such input, or a dimension that is another fixed number.
        """
        values = self._symbol_values(edit)
        changed = 0
        for node in list(edit.graph.nodes):
            stored = node.meta.get("val")
            if isinstance(stored, torch.SymInt | torch.SymFloat | torch.SymBool):
                if free_symbols(stored) <= values.keys():
                    _use_number(node, concrete(stored, values))
                    changed += 1
            elif node.op == "placeholder" and free_symbols(stored) & values.keys():
                edit.set_sizes(node, [_fixed(size, values) for size in stored.shape])
                changed += 1
            elif node.op == "call_function" and free_symbols(stored) & values.keys():
                edit.refresh(node)
        edit.exported.example_inputs = self._example_inputs(edit.exported)
        for symbol in values:
            edit.exported.range_constraints.pop(symbol, None)
        return PassResult(changed)

    def _symbol_values(self, edit: Edit) -> dict[sympy.Symbol, int]:
        inputs = {n.name: n for n in edit.graph.find_nodes(op="placeholder") if edit.view.is_user_input(n)}
        values: dict[sympy.Symbol, int] = {}
        for name, dims in self.sizes.items():
            if name not in inputs:
                raise InvalidArgument(f"no input is called {name!r}; the inputs are {', '.join(inputs)}")
            for dim, length in dims.items():
                size = inputs[name].meta["val"].shape[dim]
                symbols = free_symbols(size)
                if not symbols and int(size) != length:
                    raise InvalidArgument(f"{name} has length {size} in dimension {dim}, not {length}")
                if len(symbols) == 1 and size.node.expr in symbols:
                    values[size.node.expr] = length
        return values

    def _example_inputs(self, exported: ExportedProgram) -> tuple[tuple[object, ...], dict[str, object]] | None:
        if exported.example_inputs is None:
            return None
        leaves, spec = pytree.tree_flatten(exported.example_inputs)
        names = exported.graph_signature.user_inputs
        for position, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            for dim, length in self.sizes.get(str(name), {}).items():
                if not isinstance(leaf, Tensor) or leaf.shape[dim] < length:
                    raise InvalidType(f"the example input {name} is shorter than {length} in dimension {dim}")
                leaf = leaf.narrow(dim, 0, length).contiguous()
            leaves[position] = leaf
        return pytree.tree_unflatten(leaves, spec)


def _use_number(node: Node, number: int | float | bool) -> None:
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: number if n is node else n)


def _fixed(size: object, values: Mapping[sympy.Symbol, int]) -> object:
    return concrete(size, values) if free_symbols(size) <= values.keys() else size  # pyright: ignore[reportArgumentType]
