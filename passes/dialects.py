"""What a graph may hold at each stage, as a table of rules, and the verifier that runs after every pass.

exported   whatever `torch.export` gave, functional
canonical  functional plain ATen: attention is one SDPA, RMSNorm is one rms_norm, no asserts, no-ops or dropout
optimized  canonical plus `graphwright::` operators
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import VerificationError
from ..patterns.nodes import aten
from ..torch_private import pytree
from .edit import ASSERTS, Edit


@dataclass(frozen=True)
class Rule:
    """One thing that must hold of every call in a dialect."""

    name: str
    holds: Callable[[Node], bool]


def _namespace(node: Node) -> str:
    return getattr(node.target, "namespace", getattr(node.target, "__module__", ""))


_FUNCTIONAL = Rule(
    "is functional",
    lambda node: not getattr(getattr(node.target, "_schema", None), "is_mutable", False),
)
_PLAIN = Rule(
    "is plain ATen",
    lambda node: (
        _namespace(node) in ("aten", "prims", "_operator", "math", "torch", "torch._ops") or _is_symbolic(node)
    ),
)
_OURS = Rule(
    "is ATen or graphwright",
    lambda node: _namespace(node) == "graphwright" or _PLAIN.holds(node),
)
_NO_ASSERTS = Rule("is no assertion", lambda node: node.target not in ASSERTS)
_NO_DROPOUT = Rule("is no dropout", lambda node: node.target not in (aten.dropout.default, aten.native_dropout.default))
_TYPED = Rule("has metadata", lambda node: "val" in node.meta)

DIALECTS: dict[str, tuple[Rule, ...]] = {
    "exported": (_FUNCTIONAL,),
    "canonical": (_FUNCTIONAL, _PLAIN, _NO_ASSERTS, _NO_DROPOUT, _TYPED),
    "optimized": (_FUNCTIONAL, _OURS, _NO_ASSERTS, _NO_DROPOUT, _TYPED),
}


def verify(exported: ExportedProgram, dialect: str, after: str, touched: Iterable[Node] = ()) -> None:
    """Check dialect, graph, signature and metadata.

    Args:
        exported: The program.
        dialect: Name of the dialect that it must be in.
        after: Name of the pass that ran, for the message.
        touched: Nodes whose metadata is recomputed and compared.

    Raises:
        VerificationError: Names the pass, the node and the rule.
    """
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        for rule in DIALECTS[dialect]:
            if not rule.holds(node):
                raise VerificationError(
                    f"after {after}: {node.format_node()} breaks the rule of {dialect}: {rule.name}"
                )
    try:
        exported.graph.lint()
        exported.validate()
    except Exception as error:
        raise VerificationError(f"after {after}: {type(error).__name__}: {error}") from error
    edit = Edit(exported)
    for node in touched:
        expected, stored = edit.fake_value(node), node.meta["val"]
        if isinstance(stored, Tensor) and (expected.dtype != stored.dtype or expected.dim() != stored.dim()):
            raise VerificationError(
                f"after {after}: {node.name} is {stored.dtype}{list(stored.shape)} in the metadata"
                f" and {expected.dtype}{list(expected.shape)} in truth"
            )


def example_outputs(exported: ExportedProgram) -> list[Tensor]:
    """Run a program on its example inputs: every tensor that the graph returns, new state included.

    The graph is functional, so no state is written. Random operators start from one seed, so that runs compare.

    Raises:
        VerificationError: The program carries no example inputs.
    """
    if exported.example_inputs is None:
        raise VerificationError("the program carries no example inputs to check the numbers on")
    flat = pytree.tree_leaves(exported.example_inputs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run_functional(exported, flat)


def run_functional(exported: ExportedProgram, inputs: list[object]) -> list[Tensor]:
    """Interpret the functional graph.

    Args:
        exported: The program.
        inputs: User inputs, flat, in the graph's order.

    Returns:
        All tensors that the graph returns, in the order of the output specs.
    """
    with torch.no_grad():
        arguments = graph_arguments(exported, inputs)
        outputs = torch.fx.Interpreter(exported.graph_module).run(*arguments, enable_io_processing=False)
    return [value for value in outputs if isinstance(value, Tensor)]


def graph_arguments(exported: ExportedProgram, inputs: Sequence[object]) -> list[Any]:
    """Values for all of the graph's placeholders: stored tensors, and user inputs where they belong."""
    values = iter(inputs)
    specs = exported.graph_signature.input_specs
    return [next(values) if spec.target is None else stored_value(exported, spec.target) for spec in specs]


def stored_value(exported: ExportedProgram, target: str) -> Any:
    """The parameter, buffer or constant of a fully qualified name."""
    stored = exported.state_dict.get(target)
    return exported.constants[target] if stored is None else stored


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest absolute difference over the largest absolute value, over all outputs; infinite where shapes differ."""
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if torch.equal(a, b):
            continue
        a, b = a.double(), b.double()
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)))
    return worst


def _is_symbolic(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat)


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference that re-associating sums may cause in an exact pass, by the least precise dtype in it."""
