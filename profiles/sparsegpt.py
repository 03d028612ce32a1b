"""SparseGPT: prune a weight one input channel at a time, and let the channels to come make up for the error.

    H = sum_t x_t x_t^T,     U = upper Cholesky factor of (H + damp mean(diag H) I)^-1
    saliency[i, j] = W[i, j]^2 / U[j, j]^2                 the least of a block of 128 channels (of m neighbours) go
    for each j:   e = (W[:, j] - kept[:, j]) / U[j, j],    W[:, l] -= e U[j, l] for all l > j

Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1 (block 128, damping 0.01). It is GPTQ with pruning in
place of rounding (`gptq.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gptq import inverse_factor
from .wanda import check_pattern, pruned_of

BLOCK = 128
DAMP = 0.01


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, pattern: tuple[int, int] | None = None, damp: float = DAMP
) -> Tensor:
    """Prune a weight so that its product with the calibration tokens changes least.

    Args:
        weight: Float [N, K].
        hessian: x^T x of the tokens, up to a factor, [K, K].
        sparsity: Share of the weight that becomes zero, from 0 to 1; in each block of 128 channels, over all rows.
        pattern: n of every m neighbours of a row stay instead.
        damp: Share of the mean diagonal that is added to the diagonal.

    Returns:
        The pruned weight, in the weight's dtype; what stays has changed too.

    Raises:
        InvalidArgument: A sparsity outside 0 to 1, or blocks that do not divide the row.
    """
    work = weight.detach().float().clone()
    rows, k = work.shape
    pruned_of(k, sparsity)
    n, m = check_pattern(pattern, k) if pattern is not None else (0, 1)
    factor = inverse_factor(hessian.float(), work, damp)
    for start in range(0, k, BLOCK):
        part, inner = work[:, start : start + BLOCK], factor[start : start + BLOCK, start : start + BLOCK]
        width = part.shape[1]
        keep = torch.ones_like(part, dtype=torch.bool)
        if pattern is None:
            saliency = (part / inner.diagonal()).square().flatten()
            order = saliency.argsort(stable=True)[: pruned_of(rows * width, sparsity)]
            keep.view(-1)[order] = False
        errors = torch.empty_like(part)
        for column in range(width):
            if pattern is not None and column % m == 0:
                block = slice(column, column + m)
                saliency = (part[:, block] / inner.diagonal()[block]).square()
                order = saliency.argsort(dim=1, stable=True)[:, : m - n]
                keep[:, block] = torch.ones_like(saliency, dtype=torch.bool).scatter_(1, order, False)
            current = part[:, column].clone()
            error = torch.where(keep[:, column], 0.0, current) / inner[column, column]
            part[:, column:].addr_(error, inner[column, column:], alpha=-1)
            part[:, column] = torch.where(keep[:, column], current, 0.0)
            errors[:, column] = error
        work[:, start + BLOCK :].addmm_(errors, factor[start : start + BLOCK, start + BLOCK :], alpha=-1)
    return work.to(weight.dtype)
