"""The part of a report that is about sparse linears: how much is sparse, and what that is worth on which hardware."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from ..passes.decision import Decision
from .tables import Table

if TYPE_CHECKING:
    from ..program import Program

MERGE = "merge_sparse_adapters"
SPARSE = ("sparsify_activations", "sparsify_quantize_linear")
HARDWARE = (
    "  This is a share of arithmetic, not of time. Sparse tensor cores (NVIDIA, from capability 8.0) skip half of 2:4"
    " in 16-bit types; 4:8, 8:16 and 16:32 have no NVIDIA hardware, and CPUs have none: there the zeros are"
    " multiplied, and selecting them costs time."
)


WEIGHTS = (
    "  Zeros of weights save memory. On a CPU a decode step reads the compressed weights in about the time of dense"
    " ones, and a prefill makes them dense first, which costs time; on CUDA 2:4 in 16-bit types runs on sparse tensor"
    " cores."
)


def sparsity_parts(program: Program) -> list[RenderableType]:
    """What to print, nothing where nothing was made sparse."""
    return [*_activations(program), *_weights(program)]


def _weights(program: Program) -> list[RenderableType]:
    """Zeros and bytes of sparse weights."""
    kept = {d.options["weight"]: d for d in program.decisions if d.status == "kept" and d.pass_name == MERGE}
    if not kept:
        return []
    tensors = program.profile.tensors
    dense = stored = values = 0
    for name, decision in kept.items():
        columns, rows = map(int, decision.facts["features"].split(" -> "))
        parts = [tensors[f"{name}.{part}"] for part in ("bits", "values", "starts")]
        dense += rows * columns * parts[1].element_size()
        stored += sum(part.nbytes for part in parts)
        values += parts[1].nbytes
    lines: list[RenderableType] = [
        f"sparse weights: {1 - values / dense:.1%} zeros in {len(kept)} linears, {stored / 1e6:.1f} MB compressed,"
        f" {stored / dense:.3f} of dense",
        WEIGHTS,
    ]
    steps = (program.profile.measured.get("losa") or {}).get("steps", [])
    for number, step in enumerate(steps, 1):
        losses = step.get("losses") or []
        trained = f", loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} updates" if losses else ""
        lines.append(
            f"  step {number}: {step['zeros']:.1%} zeros, ranks {min(step['ranks'])} to {max(step['ranks'])}{trained}"
        )
    return lines


def _activations(program: Program) -> list[RenderableType]:
    kept = [d for d in program.decisions if d.status == "kept" and d.pass_name in SPARSE]
    if not kept:
        return []
    phase = kept[0].phase
    there = [d for d in program.decisions if d.phase == phase and "multiply-adds" in d.figures]
    sparse = [d for d in kept if d.phase == phase]
    share = coverage(sparse) / (coverage(there) or 1)
    patterns = sorted({f"{d.options['n']}:{d.options['m']}" for d in sparse})
    fast = sum(d.options.get("kernel") == "semi_structured" for d in sparse)
    parts: list[RenderableType] = [
        f"sparse activations in {phase}: {', '.join(patterns)} in {share:.1%} of linear arithmetic (heads left out)",
        _roles(there, sparse),
        HARDWARE,
    ]
    if fast:
        parts.append(f"  {fast} of {len(sparse)} sites run on sparse tensor cores, where they were measured faster.")
    for method in ("amber", "outstanding"):
        layers = (program.profile.measured.get(method) or {}).get("skipped_layers")
        if layers:
            parts.append(f"  layers skipped as most sensitive: {', '.join(map(str, sorted(layers)))}")
    return parts


def coverage(decisions: Sequence[Decision]) -> int:
    """Multiply-adds of a token at these sites."""
    return sum(int(d.figures.get("multiply-adds", 0)) for d in decisions)


def _roles(there: Sequence[Decision], sparse: Sequence[Decision]) -> Table:
    table = Table()
    for column, justify in (("role", "left"), ("sparse", "right"), ("dense", "right"), ("sensitivity", "right")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    ids = {d.site for d in sparse}
    by_role: dict[str, list[Decision]] = {}
    for decision in there:
        by_role.setdefault(decision.facts.get("role", "-"), []).append(decision)
    for role, group in by_role.items():
        kept = sum(d.site in ids for d in group)
        errors = sorted(d.figures["sensitivity"] for d in group if "sensitivity" in d.figures)
        span = f"{errors[0]:.3f} to {errors[-1]:.3f}" if errors else "-"
        table.add_row(role, str(kept), str(len(group) - kept), span)
    return table
