"""GPTQ: round a weight to 4 bits one input channel at a time, and let the channels to come make up for the error.

    H = 2 / T sum_t x_t x_t^T,     U = upper Cholesky factor of (H + damp mean(diag H) I)^-1
    for each k:   e = (w_k - round(w_k)) / U[k, k],    w_j -= e U[k, j] for all j > k

The grid of a group is fixed when its first channel is reached, from the weights as they are then: the one for which the
sum of error_k^2 / U[k, k]^2 is least, which is what rounding its channels one by one would cost.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; blocks of 128 channels are its section 3.3; damping of 0.1
is what DartQuant's script uses (0.01 in GPTQ's).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.int4_weights import Int4, channel_scale, check, group_steps, pack, rounded

_BLOCK = 128


def gptq(weight: Tensor, hessian: Tensor, group: int, damp: float = 0.1) -> Int4:
    """Round a weight [N, K] so that its product with the calibration tokens changes least.

    Args:
        weight: Float [N, K].
        hessian: x^T x of the tokens, up to a factor, float [K, K].
        group: Input channels that share a step.
        damp: Share of the mean diagonal that is added to the diagonal.

    Returns:
        The packed weight.

    Raises:
        InvalidArgument: As `quantize_groups`.
    """
    check(weight, group)
    work = weight.detach().float().clone()
    inverse = inverse_factor(hessian.float(), work, damp)
    costs = inverse.diagonal().pow(-2)
    scale = channel_scale(work, group, costs)
    n, k = work.shape
    values = torch.empty(n, k, dtype=torch.int8)
    steps = torch.empty(n, k // group)
    grid = scale
    block = max(_BLOCK, group)
    for start in range(0, k, block):
        part = work[:, start : start + block]
        factor = inverse[start : start + block, start : start + block]
        errors = torch.empty_like(part)
        for column in range(part.shape[1]):
            if (start + column) % group == 0:
                inside = slice(start + column, start + column + group)
                step = group_steps(part[:, column : column + group], scale, costs[inside])
                steps[:, (start + column) // group] = step
                grid = step * scale
            current = part[:, column]
            whole = rounded(current, grid)
            values[:, start + column] = whole.to(torch.int8)
            error = (current - whole * grid) / factor[column, column]
            part[:, column:].addr_(error, factor[column, column:], alpha=-1)
            errors[:, column] = error
        work[:, start + block :].addmm_(errors, inverse[start : start + block, start + block :], alpha=-1)
    return pack(values, steps.to(torch.int8), scale)


def inverse_factor(hessian: Tensor, weight: Tensor, damp: float) -> Tensor:
    """U [K, K]; channels that are always zero keep no weight, since nothing tells what it should be."""
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    weight[:, dead] = 0
    extra = damp * diagonal.mean().clamp_min(1e-30)
    damped = hessian + torch.diag(torch.where(dead, 1.0, 0.0) + extra)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
