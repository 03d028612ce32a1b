"""What a change of its input does to each linear's own output, one site at a time, the others as they are.

    e = ||Y - Y'||_2 / ||Y||_2        Y = x W^T + b,   Y' the same of the changed input (or with another weight)

The program runs once, node by node (`walk.py`); no error reaches the next site.

Source: Amber Pruner (arXiv:2508.02128), the sensitivity that chooses which layers to skip. That Y is the projection's
own output is inferred: the paper does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional

from ..errors import InvalidArgument
from ..patterns.linear import LinearSite
from .walk import Handler, walk

Variant = Callable[[LinearSite, Tensor, Tensor | None], Callable[[Tensor], Tensor]]
"""From a site, its weight [N, K] and its bias to a function of its input [.., K] that gives the site's other output."""


def own_errors(
    exported: ExportedProgram,
    inputs: Sequence[list[Any]],
    sites: Sequence[LinearSite],
    variant: Variant,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Relative L2 error of each site's output under a variant.

    Args:
        exported: The program; it is not changed.
        inputs: Flat inputs.
        sites: The linears to look at.
        variant: Computes what a site would give.
        on_step: Called after each site.

    Returns:
        Place -> error.

    Raises:
        InvalidArgument: An output holds NaN or infinity.
    """
    errors: dict[str, float] = {}

    def handler(site: LinearSite) -> Handler:
        def run(calls: list[tuple[Any, ...]]) -> list[Tensor]:
            outputs, off, total = [], 0.0, 0.0
            weight, bias = calls[0][1], calls[0][2] if len(calls[0]) > 2 else None
            other = variant(site, weight, bias)
            for call in calls:
                expected = functional.linear(call[0], weight, bias)
                off += float(torch.linalg.vector_norm((expected - other(call[0])).float()) ** 2)
                total += float(torch.linalg.vector_norm(expected.float()) ** 2)
                outputs.append(expected)
            error = (off / max(total, 1e-30)) ** 0.5
            if not error < float("inf"):
                raise InvalidArgument(f"the output of {site.place} holds NaN or infinity; check the calibration")
            errors[site.place] = error
            on_step()
            return outputs

        return run

    walk(exported, inputs, {site.node: handler(site) for site in sites})
    return errors
