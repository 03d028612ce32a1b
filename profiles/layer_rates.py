"""How sparse each layer becomes at each step, and how large its adapters are.

Schedule    s_t = s (1 - (1 - t/T)^3)                                        Zhu and Gupta 2017, arXiv:1710.01878
Rates       minimise sum_l I_l x_l with mean(x) = s_t and |x_l - s_t| <= delta,  I_l = exp(-beta a_l)
Ranks       r_l = clip(round(e_l / sum(e) * mean_rank * L), 1, 16), then +-1 until the mean is met

a_l is how much layer l is like the others (`cka.py`), e_l the error of its output after pruning. The rates are a linear
program whose solution lies in a corner: the half of the layers with larger importance I gets s_t - delta, the other
half s_t + delta, a middle one s_t. So beta does not matter, only the order of a. The authors' code solves it with
SLSQP, to the same corner.

Source: LoSA (arXiv:2502.14816) and its code, for delta (0.01 up to half, 0.02 up to 0.6, 0.03 beyond) and for ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidArgument

LARGEST_RANK = 16
"""Ranks are cut here, in the authors' code, which allocates 8 all the same; here 16 are allocated."""


def schedule(target: float, step: int, steps: int) -> float:
    """Sparsity after step 1 to `steps`.

    Raises:
        InvalidArgument: A sparsity outside 0 to 1, or a step that there is not.
    """
    if not 0 <= target < 1:
        raise InvalidArgument(f"got a sparsity of {target}, expected at least 0 and less than 1")
    if not 1 <= step <= steps:
        raise InvalidArgument(f"got step {step} of {steps}")
    return target * (1 - (1 - step / steps) ** 3)


def spread(sparsity: float) -> float:
    """How far a layer's rate may be from the mean (the authors' delta); rates stay in 0 to 1."""
    delta = 0.01 if sparsity <= 0.5 else 0.02 if sparsity <= 0.6 else 0.03
    return min(delta, sparsity, 1 - sparsity)


def layer_rates(redundancies: Sequence[float], sparsity: float, delta: float | None = None) -> list[float]:
    """The rate of each layer: more for layers that are like the others.

    Args:
        redundancies: How much each layer is like the others; only their order counts. Equal ones are taken in order.
        sparsity: The mean of the rates.
        delta: How far a rate may be from it; None for the published one.

    Returns:
        Rates, of that mean.

    Raises:
        InvalidArgument: A sparsity outside 0 to 1.
    """
    if not 0 <= sparsity < 1:
        raise InvalidArgument(f"got a sparsity of {sparsity}, expected at least 0 and less than 1")
    delta = spread(sparsity) if delta is None else delta
    order = sorted(range(len(redundancies)), key=lambda layer: redundancies[layer])
    half = len(order) // 2
    rates = [sparsity] * len(order)
    for position, layer in enumerate(order):
        if position < half:
            rates[layer] = sparsity - delta
        elif position >= len(order) - half:
            rates[layer] = sparsity + delta
    return rates


def layer_ranks(errors: Sequence[float], mean: int) -> list[int]:
    """The rank of each layer's adapters: more where pruning changed the layer's output most.

    Args:
        errors: Relative squared errors, not all zero.
        mean: What the ranks are on average, as far as 1 and the largest rank allow.
    """
    total, count = sum(errors) or 1.0, len(errors)
    ranks = [min(LARGEST_RANK, max(1, round(error / total * mean * count))) for error in errors]
    order = sorted(range(count), key=lambda layer: errors[layer])
    surplus = sum(ranks) - mean * count
    while surplus:
        step = -1 if surplus > 0 else 1
        able = [layer for layer in (order if step < 0 else order[::-1]) if 1 <= ranks[layer] + step <= LARGEST_RANK]
        if not able:
            break
        for layer in able[: abs(surplus)]:
            ranks[layer] += step
        surplus = sum(ranks) - mean * count
    return ranks
