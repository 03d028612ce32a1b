"""Wanda: prune the weights whose magnitude times their input's size is least, row by row, without changing the others.

    score[i, j] = |W[i, j]| ||x[:, j]||_2
    unstructured   the floor(K sparsity) least scores of each row become zero
    n:m            the m - n least of each block of m neighbours

Source: Sun et al. 2023, arXiv:2306.11695, sections 3 and 4; ties go to the lower channel, which stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument


def wanda_mask(weight: Tensor, squares: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """What stays.

    Args:
        weight: Float [N, K].
        squares: Sum or mean over tokens of each channel's square, [K].
        sparsity: Share of each row that becomes zero, from 0 to 1.
        pattern: n of every m stay instead.

    Returns:
        bool [N, K].

    Raises:
        InvalidArgument: A sparsity outside 0 to 1, or blocks that do not divide the row.
    """
    scores = weight.detach().float().abs() * squares.float().clamp_min(0).sqrt()
    rows, k = weight.shape
    if pattern is not None:
        n, m = check_pattern(pattern, k)
        scores, count = scores.view(-1, m), m - n
    else:
        count = pruned_of(k, sparsity)
    keep = torch.ones_like(scores, dtype=torch.bool)
    if count:
        # Reversed, so that among equal scores the higher channel comes first and goes.
        order = scores.flip(-1).sort(dim=-1, stable=True).indices[:, :count]
        keep.scatter_(-1, scores.shape[-1] - 1 - order, False)
    return keep.view(rows, k)


def pruned_of(k: int, sparsity: float) -> int:
    """Weights of a row of k that become zero.

    Raises:
        InvalidArgument: A sparsity outside 0 to 1.
    """
    if not 0 <= sparsity <= 1:
        raise InvalidArgument(f"got a sparsity of {sparsity}, expected 0 to 1")
    return int(k * sparsity + 1e-9)


def check_pattern(pattern: tuple[int, int], k: int) -> tuple[int, int]:
    """The pattern, if it divides a row of k.

    Raises:
        InvalidArgument: It does not, or n > m.
    """
    n, m = pattern
    if not 1 <= n <= m:
        raise InvalidArgument(f"got n={n} of m={m}, expected 1 to {m}")
    if k % m:
        raise InvalidArgument(f"blocks of {m} do not divide {k} channels")
    return n, m
