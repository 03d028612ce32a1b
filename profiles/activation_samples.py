"""Rows of activations, drawn uniformly over tokens in one run of the program, and what rounding does to them.

Rotations are fitted to and judged by these rows; the program is never run again for it, and never differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import InvalidArgument
from ..kernels.int4_weights import dequantized, quantize_groups
from ..kernels.int8_linear import quantize_per_channel
from ..kernels.token_grid import quantize_tokens
from ..patterns.nodes import arguments, describe
from ..patterns.norm import LAYER_NORM
from ..patterns.residual import ResidualStream
from .walk import Handler, walk

FEWEST = 128
"""Tokens that calibration must have: a rotation fitted to fewer rows than channels fits the texts."""


@dataclass(frozen=True)
class Precision:
    """How a linear is to run.

    Attributes:
        weight_bits, activation_bits: 4, 8 or 16.
        group: Input channels that share a step, where weights have 4 bits.
        clip: Share of a token's range that is kept.
    """

    weight_bits: int
    activation_bits: int
    group: int
    clip: float


def tokens_of(inputs: Sequence[list[Any]]) -> int:
    """How many tokens the first input of each call has together."""
    return sum(next((v.numel() for v in flat if isinstance(v, Tensor)), 0) for flat in inputs)


def sample_rows(
    exported: ExportedProgram,
    inputs: Sequence[list[Any]],
    streams: Sequence[ResidualStream],
    linears: Sequence[Node],
    count: int,
    generator: torch.Generator,
) -> dict[Node, Tensor]:
    """Run a program once and keep some rows of what norms of streams and some linears read.

    Args:
        exported: The program.
        inputs: Flat inputs.
        streams: Their norms are sampled without gain and shift, as they are once these are folded.
        linears: Their inputs are sampled.
        count: Rows of each.
        generator: Draws them.

    Returns:
        Norm or linear -> float32 [<= count, K].

    Raises:
        InvalidArgument: An activation holds NaN or infinity.
    """
    found: dict[Node, Tensor] = {}

    def keep(node: Node, parts: list[Tensor]) -> None:
        rows = torch.cat(
            [_drawn(part.reshape(-1, part.shape[-1]), -(-count // len(parts)), generator) for part in parts]
        )
        if not rows.isfinite().all():
            raise InvalidArgument(f"the activations at {describe(node)} hold NaN or infinity; check the calibration")
        found[node] = rows

    def norm_handler(node: Node) -> Handler:
        args = arguments(node)
        layer = node.target is LAYER_NORM
        function = torch.nn.functional.layer_norm if layer else torch.nn.functional.rms_norm
        shape, eps = list(args["normalized_shape"]), args["eps"]

        def run(calls: list[tuple[Any, ...]]) -> list[Tensor]:
            bare = [(None, None) if layer else (None,)] * len(calls)
            keep(node, [function(call[0], shape, *none, eps=eps) for call, none in zip(calls, bare, strict=True)])
            target: Any = node.target
            return [target(*call) for call in calls]

        return run

    def linear_handler(node: Node) -> Handler:
        def run(calls: list[tuple[Any, ...]]) -> list[Tensor]:
            keep(node, [call[0] for call in calls])
            return [torch.nn.functional.linear(*call) for call in calls]

        return run

    handlers = {norm: norm_handler(norm) for stream in streams for norm, _ in stream.norms}
    walk(exported, inputs, handlers | {node: linear_handler(node) for node in linears})
    return found


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(rows) <= count:
        return rows.float().clone()
    return rows[torch.randperm(len(rows), generator=generator)[:count]].float()


def rounded_weight(weight: Tensor, precision: Precision) -> Tensor:
    """A weight [N, K] after rounding to nearest, float32."""
    if precision.weight_bits == 4:
        return dequantized(quantize_groups(weight, precision.group))
    if precision.weight_bits == 8:
        values, scale = quantize_per_channel(weight)
        return values.float() * scale[:, None]
    return weight.float()


def rounded_rows(rows: Tensor, precision: Precision) -> Tensor:
    """Activations [T, K] after rounding."""
    if precision.activation_bits == 16:
        return rows.float()
    values, step, _ = quantize_tokens(rows.float(), precision.activation_bits, precision.clip)
    return values * step


def output_error(rows: Tensor, weight: Tensor, precision: Precision, change: Callable[[Tensor], Tensor]) -> float:
    """Relative squared error of a linear's output [T, N], rows and weight rounded to nearest after `change` of both."""
    expected = rows @ weight.float().t()
    got = rounded_rows(change(rows), precision) @ rounded_weight(change(weight.float()), precision).t()
    return float((got - expected).square().sum() / expected.square().sum().clamp_min(1e-30))
