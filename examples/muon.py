"""Muon: momentum whose matrices are made orthogonal, for the weight matrices of a transformer.

    B <- momentum B + (1 - momentum) G        U = orthogonal((1 - momentum) G + momentum B)
    W <- (1 - decay rate) W - rate 0.2 sqrt(max(rows, columns)) U

Five Newton-Schulz steps in bfloat16 bring the singular values near 1. Matrices of one shape are made orthogonal
together, in a handful of kernels. `train_tiny_wan.py` says what it gains over AdamW there.

Sources: Jordan et al., Muon (2024), with its polynomial; the factor 0.2 sqrt(max), which makes rates comparable to
AdamW's, from Moonlight, arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.errors import InvalidArgument

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Updates weight matrices; everything else is for another optimizer.

    Args:
        matrices: Parameters with two dimensions, on one device.
        lr: Learning rate.
        momentum: As in the module's formula.
        weight_decay: `decay` there.

    Raises:
        InvalidArgument: A parameter is no matrix.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float = 5e-3, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._together: list[tuple[dict, list[nn.Parameter], Tensor]] = []
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.ndim != 2:
                    raise InvalidArgument(f"got a parameter of shape {list(matrix.shape)}, expected matrices")
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, own in by_shape.items():
                self._together.append((group, own, own[0].new_zeros(len(own), *shape)))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices; each must have a gradient."""
        for group, matrices, average in self._together:
            momentum = group["momentum"]
            gradient = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
            average.lerp_(gradient, 1 - momentum)
            update = orthogonal(torch.lerp(gradient, average, momentum)).float()
            distance = group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5
            for matrix, direction in zip(matrices, update, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=distance)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of `matrices`, bfloat16 [n, rows, columns].

    Args:
        matrices: [n, rows, columns].
        steps: Of the iteration; 5 bring singular values that are not tiny beside the largest to 0.6 to 1.2.
    """
    linear, cubic, quintic = _POLYNOMIAL
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=cubic, alpha=quintic), x, beta=linear)
    return x.mT if tall else x
