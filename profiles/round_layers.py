"""Round the weights of a program's linears to 4 bits, layer by layer, each on what the rounded layers before it give.

GPTQ keeps a linear's output on the inputs X' that it now gets, W X'. GPTAQ keeps the output W X that the linear gave
before anything was rounded, so that a layer makes up for the layers before it:

    W' = W + W (X - X') X'^T (X' X'^T + damp)^-1,     then GPTQ of W' on X'

Its X' are rounded as the program will round them. Both runs go through the graph together, one node at a time
(`walk.py`), so memory holds one layer's activations, of GPTAQ twice.

Source: GPTQ (Frantar et al. 2022, arXiv:2210.17323); GPTAQ (Li et al. 2025, arXiv:2504.02692), equation of W' as the
closed form of its section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import InvalidArgument
from ..kernels import hadamard
from ..kernels.int4_weights import Int4, dequantized
from ..patterns.linear import LinearSite
from ..patterns.nodes import describe
from .activation_samples import Precision, rounded_rows
from .gptq import gptq
from .walk import Handler, walk


@dataclass(frozen=True)
class Rounding:
    """How a linear's weight is rounded.

    Attributes:
        precision: Of its weight, in groups, and of its input.
        rotated: Whether its input is rotated when the program runs (R4).
        damp: Share of the mean diagonal that is added to the statistics.
    """

    precision: Precision
    rotated: bool
    damp: float


def round_layers(
    exported: ExportedProgram,
    inputs: Sequence[list[Any]],
    linears: Mapping[LinearSite, Rounding],
    *,
    original: bool,
    on_layer: Callable[[], None] | None = None,
) -> dict[str, Int4]:
    """Round the weights of some linears.

    Args:
        exported: The program with all rotations folded; it is not changed.
        inputs: Flat inputs.
        linears: What to round, and how.
        original: Aim at what the linears gave before anything was rounded (GPTAQ), not at what they give now (GPTQ).
        on_layer: Called after each linear.

    Returns:
        Place -> rounded weight.

    Raises:
        InvalidArgument: Activations hold NaN or infinity.
    """
    made: dict[str, Int4] = {}
    known: dict[tuple[Any, bool], tuple[Tensor, Tensor | None]] = {}

    def handler(site: LinearSite, how: Rounding) -> Handler:
        change: Callable[[Tensor], Tensor] = hadamard.reference if how.rotated else torch.Tensor.float

        def rows_of(call: tuple[Any, ...]) -> Tensor:
            return change(call[0]).reshape(-1, site.in_features)

        def run(calls: list[tuple[Any, ...]]) -> list[Tensor]:
            before = calls[len(inputs) :]
            rows = [rows_of(call) for call in calls[: len(inputs)]]
            if original:
                rows = [rounded_rows(part, how.precision) for part in rows]
            key = (site.input, how.rotated)
            if key not in known:
                known.clear()  # what reads one activation follows one another
                known[key] = _statistics(rows, [rows_of(call) for call in before], site)
            hessian, drift = known[key]
            weight = change(calls[0][1])
            if drift is not None:
                weight = weight + _correction(weight, hessian, drift, how.damp)
            made[site.place] = gptq(weight, hessian, how.precision.group, how.damp)
            weight = dequantized(made[site.place])
            outputs = [_output(part, weight, call) for part, call in zip(rows, calls, strict=False)]
            if on_layer is not None:
                on_layer()
            return outputs + [torch.nn.functional.linear(*call) for call in before]

        return run

    handlers = {site.node: handler(site, how) for site, how in linears.items()}
    walk(exported, [*inputs, *inputs] if original else inputs, handlers)
    return made


def _output(rows: Tensor, weight: Tensor, call: Sequence[Any]) -> Tensor:
    """A linear's output [..., N] in its dtype, from rows [T, K] and weight [N, K] of float32."""
    y = (rows @ weight.t()).view(*call[0].shape[:-1], -1)
    bias = call[2] if len(call) > 2 else None
    return (y if bias is None else y + bias.float()).to(call[0].dtype)


def _statistics(rows: Sequence[Tensor], before: Sequence[Tensor], site: LinearSite) -> tuple[Tensor, Tensor | None]:
    """X' X'^T and (X - X') X'^T, float32 [K, K]; the latter None where there is no X."""
    hessian = torch.zeros(site.in_features, site.in_features)
    drift = torch.zeros_like(hessian) if before else None
    for part in rows:
        hessian.addmm_(part.t(), part)
    for part, exact in zip(rows, before, strict=False):
        assert drift is not None
        drift.addmm_((exact - part).t(), part)
    if not hessian.isfinite().all():
        raise InvalidArgument(f"the activations at {describe(site.node)} hold NaN or infinity; check the calibration")
    return hessian, drift


def _correction(weight: Tensor, hessian: Tensor, drift: Tensor, damp: float) -> Tensor:
    """W (X - X') X'^T (X' X'^T + damp)^-1, float32 [N, K]."""
    extra = (damp * hessian.diagonal().mean()).clamp_min(1e-30)
    damped = hessian + extra * torch.eye(len(hessian))
    return torch.cholesky_solve((weight @ drift).t(), torch.linalg.cholesky(damped)).t()
