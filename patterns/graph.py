"""Reading an exported graph: the facts that every matcher asks for, taken from dataflow and metadata, never from names.

`GraphView` wraps an `ExportedProgram` and answers what a node is (weight, state, input), where it came from (module
path, source line) and what it would compute at concrete sizes. The last is how facts are *proved*: a chain of views or
a mask is evaluated at several sizes on small tensors, so any way of writing the same thing is recognised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.node import map_arg

from .nodes import (
    CASTS,
    PARTS,
    RESHAPES,
    VIEWS,
    NotEvaluable,
    aten,
    concrete,
    first_tensor,
    free_symbols,
    is_call,
)


@dataclass(frozen=True)
class Refusal:
    """Why a node is not a site: the fact that failed, where, and what was seen.

    Attributes:
        node: Name of the node at which matching ended.
        reason: One clause in plain words.
        facts: What was seen, by name.
        depth: How many facts had been proved before; the deepest refusal is the nearest miss.
        module_path: Module that the node came from.
        source: Source line of the model.
    """

    node: str
    reason: str
    facts: Mapping[str, object]
    depth: int = 0
    module_path: str = ""
    source: str = ""

    def __str__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self.facts.items())
        return f"{self.reason}" + (f" ({facts})" if facts else "")


class GraphView:
    """What an exported program's graph says about its nodes.

    Args:
        exported: A functional program (`run_decompositions({})` has been applied).
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.graph = exported.graph
        signature = exported.graph_signature
        self._targets: dict[str, str] = {}
        self._kinds: dict[str, InputKind] = {}
        for spec in signature.input_specs:
            name = getattr(spec.arg, "name", None)
            if name is None:
                continue
            self._kinds[name] = spec.kind
            if spec.target is not None:
                self._targets[name] = spec.target
        self.mutated: dict[str, str] = {
            spec.arg.name: spec.target
            for spec in signature.output_specs
            if spec.kind is OutputKind.BUFFER_MUTATION and spec.target is not None
        }
        """Output node name -> fully qualified name of the buffer that it becomes."""
        self._state = set(self.mutated.values())

    # ---- what a node is

    def target(self, node: Node) -> str | None:
        """Fully qualified name of the parameter, buffer or constant that a placeholder stands for."""
        return self._targets.get(node.name) if node.op == "placeholder" else None

    def is_user_input(self, node: Node) -> bool:
        """Whether the node is an argument of the call."""
        return node.op == "placeholder" and self._kinds.get(node.name) is InputKind.USER_INPUT

    def is_state(self, node: Node) -> bool:
        """Whether the node is a buffer that the program writes."""
        return self.target(node) in self._state if node.op == "placeholder" else False

    def is_weight(self, node: Node) -> bool:
        """Whether the node is a parameter, buffer or constant that the program never writes."""
        return self.target(node) is not None and not self.is_state(node)

    def tensor(self, node: Node) -> Tensor | None:
        """The tensor behind a weight placeholder, or None where the node is not one."""
        if not self.is_weight(node):
            return None
        return self.stored(self._targets[node.name])

    def stored(self, target: str) -> Tensor | None:
        """The tensor of a fully qualified name, from the state dict or the constants."""
        value = self.exported.state_dict.get(target)
        if value is None:
            value = self.exported.constants.get(target)
        return value if isinstance(value, Tensor) else None

    # ---- where it came from

    def module_path(self, node: Node) -> str:
        """Dotted path of the innermost module that the node was traced in, "" where it is unknown."""
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return ""
        path = list(stack.values())[-1][0]
        if path == "_empty_nn_module_stack_from_metadata_hook":
            return ""
        return re.sub(r"^L\['self'\]\.?|^_export_root\.?|^getattr_L__self___", "", path)

    def source(self, node: Node) -> str:
        """`file.py:line code` of the innermost frame that is the model's own, "" where it is unknown."""
        frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
        if not frames:
            return ""
        own = [frame for frame in frames if "/torch/nn/" not in frame[0]]
        path, line, code = (own or frames)[-1]
        return f"{path.rsplit('/', 1)[-1]}:{line} {code.strip()}"

    def refuse(self, node: Node, reason: str, *, depth: int = 0, **facts: object) -> Refusal:
        """A refusal at a node, with the node's module path and source line."""
        return Refusal(node.name, reason, facts, depth, self.module_path(node), self.source(node))

    # ---- what it would compute

    def assignments(self, nodes: Iterable[Node], count: int = 2) -> list[dict[Any, int]]:
        """Concrete values for every size symbol in the nodes' shapes, inside the program's ranges and all different.

        Args:
            nodes: Nodes with tensor or size metadata.
            count: How many assignments.

        Returns:
            `count` maps from sympy symbol to value; one empty map where nothing is symbolic.
        """
        symbols = sorted({symbol for node in nodes for symbol in free_symbols(node.meta.get("val"))}, key=str)
        if not symbols:
            return [{}]
        primes = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
        result = []
        for round_ in range(count):
            values = {}
            for position, symbol in enumerate(symbols):
                wanted = primes[(position + round_ * 3) % len(primes)]
                limits = self.exported.range_constraints.get(symbol)
                if limits is not None:
                    # An unbounded end is no number: it is compared, never converted.
                    low, high = int(max(limits.lower, 0)), int(min(limits.upper, 1 << 30))
                    wanted = max(low, min(high, wanted))
                values[symbol] = wanted
            result.append(values)
        return result

    def evaluate(self, node: Node, given: Mapping[Node, Any], sizes: Mapping[Any, int]) -> Any:
        """Compute one node at concrete sizes.

        Args:
            node: The node wanted.
            given: Values for nodes at which to stop, usually inputs.
            sizes: Value of each size symbol, from `assignments`.

        Returns:
            The node's value.

        Raises:
            NotEvaluable: The node depends on a user input or a state that is not in `given`.
        """
        values: dict[Node, Any] = dict(given)
        for step in self.ancestors(node, stop=given):
            if step in values:
                continue
            symbolic = step.meta.get("val")
            if isinstance(symbolic, torch.SymInt | torch.SymBool | torch.SymFloat):
                values[step] = concrete(symbolic, sizes)
            elif step.op == "placeholder":
                stored = self.tensor(step)
                if stored is None or stored.device.type == "meta":
                    raise NotEvaluable(step)
                values[step] = stored
            elif step.op == "call_function":
                args = map_arg(step.args, lambda n: values[n])
                kwargs = map_arg(step.kwargs, lambda n: values[n])
                assert callable(step.target)
                values[step] = step.target(*args, **kwargs)
            else:
                raise NotEvaluable(step)
        return values[node]

    def ancestors(self, node: Node, stop: Iterable[Node] = ()) -> list[Node]:
        """The nodes that a node is computed from, itself last, in topological order, not going beyond `stop`.

        A node whose metadata is a symbolic size counts as a leaf: its value follows from the sizes alone.
        """
        ends = set(stop)
        seen: dict[Node, bool] = {}
        stack: list[tuple[Node, bool]] = [(node, False)]
        order = []
        while stack:
            current, done = stack.pop()
            if done:
                order.append(current)
                continue
            if current in seen:
                continue
            seen[current] = True
            stack.append((current, True))
            leaf = current in ends or isinstance(current.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat)
            if not leaf:
                stack.extend((parent, False) for parent in current.all_input_nodes if parent not in seen)
        return order

    def is_layout_of(
        self, node: Node, base: Node, expected: Callable[[Tensor], Tensor], chain: Sequence[Node] | None = None
    ) -> bool:
        """Prove that `node` is `expected(base)`, by evaluating the views between them on indices.

        Args:
            node: End of the chain.
            base: Its beginning.
            expected: The layout claimed, for example `lambda x: x.transpose(-1, -2)`.
            chain: The nodes from `node` back to `base` (excluded), where they do not simply follow principal inputs.
                Steps that are not views count as elementwise.

        Returns:
            Whether every element is where it is claimed to be, at all sizes tried.
        """
        layouts = self.layouts(node, base, chain)
        try:
            return layouts is not None and all(torch.equal(value, expected(indices)) for value, indices in layouts)
        except (RuntimeError, IndexError, KeyError, TypeError):
            return False

    def layouts(
        self, node: Node, base: Node, chain: Sequence[Node] | None = None
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Which element of `base` each element of `node` is, at several sizes.

        Args:
            node: End of the chain.
            base: Its beginning.
            chain: As in `is_layout_of`.

        Returns:
            For each choice of sizes, int64 indices with the shape of `node`, and those that were put in for `base`,
            0, 1, 2, ...; None where the views between them cannot be evaluated.
        """
        steps = list(_chain(node, base)) if chain is None else list(chain)
        found = []
        for sizes in self.assignments([node, base]):
            try:
                shape = [int(concrete(size, sizes)) for size in base.meta["val"].shape]
                indices = torch.arange(math.prod(shape)).reshape(shape)
                value: Any = indices
                for step in reversed(steps):
                    if step.target in VIEWS or step.target in PARTS:
                        value = self._apply_view(step, value, sizes)
            except (RuntimeError, NotEvaluable, IndexError, KeyError, TypeError):
                return None
            found.append((value, indices))
        return found

    def _apply_view(self, node: Node, value: Tensor, sizes: Mapping[Any, int]) -> Tensor:
        assert callable(node.target)
        args: Any = map_arg(node.args, lambda n: value if n is node.args[0] else self.evaluate(n, {}, sizes))
        if node.target in (aten.view.default, aten._unsafe_view.default):
            return value.reshape(args[1])
        kwargs = {} if node.target is aten.clone.default else node.kwargs
        return node.target(*args, **kwargs)


def _chain(node: Node, base: Node) -> Iterator[Node]:
    """The nodes from `node` back to `base` (excluded) along principal inputs."""
    while node is not base:
        yield node
        node = first_tensor(node)


def scalar_of(view: GraphView, value: Any) -> float | None:
    """A Python number or a one-element constant tensor as a float; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Node):
        if is_call(value, *CASTS, *RESHAPES, aten.lift_fresh_copy.default):
            return scalar_of(view, value.args[0])
        if is_call(value, aten.full.default) and list(value.args[0]) == []:  # pyright: ignore[reportArgumentType]
            return scalar_of(view, value.args[1])
        stored = view.tensor(value)
        if stored is not None and stored.numel() == 1 and stored.device.type != "meta":
            return float(stored)
    return None
