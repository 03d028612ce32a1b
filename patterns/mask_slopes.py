"""Masks that add a line over the keys to the scores they keep, one slope a head, as ALiBi does.

    mask[h, i, j] = slope[h] j + c[h, i]      where key j is kept; dropped keys are 9000 or more below that

c does not matter: softmax is the same whatever is added to a whole row. So Bloom's slope * j, the paper's
slope * (j - i) and slope * (j - start of the sequence) are one thing.

Source: ALiBi, Press et al. 2021, arXiv 2108.12409.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mask_sizes import LOWEST, Unproved

_ROUNDINGS = 4.0  # a product, a difference, and both ends of the row that a slope is taken from


@dataclass(frozen=True)
class Slopes:
    """The slopes of one evaluation.

    Attributes:
        values: float64 [heads], or [1] where the mask is one for all; nan where no query sees two keys.
        errors: float64 [heads], how far rounding may have brought each from what it should be.
    """

    values: Tensor
    errors: Tensor


def split_slopes(value: Tensor) -> tuple[Tensor, Slopes]:
    """What a float mask keeps, and the slopes of what it adds to that.

    Args:
        value: [..., queries, keys], added to scores; the dimension before, if any, is that of heads.

    Returns:
        What it keeps, bool and of the same shape, and the slopes: zeros where it adds nothing.

    Raises:
        Unproved: It adds something else than lines, of float32: 0.3 j rounded to bfloat16 is none.
    """
    heads = value.shape[-3] if value.dim() > 2 else 1
    mask = value.double().reshape(-1, heads, *value.shape[-2:])
    keep = mask > LOWEST
    added = keep & (mask != 0)
    endless = mask.isnan() | mask.isposinf()
    if endless.any():
        raise Unproved(f"the mask adds a bias, for example {float(mask[endless][0])}")
    if 0 in mask.shape:
        return keep.view(value.shape), Slopes(*torch.full((2, heads), float("nan"), dtype=torch.float64))
    first, last = keep.byte().argmax(-1), mask.shape[-1] - 1 - keep.flip(-1).byte().argmax(-1)
    span = torch.where(keep.any(-1), last - first, 0)
    low, high = (mask.gather(-1, at[..., None])[..., 0] for at in (first, last))
    # The widest row of each head tells its slope, the others have to agree.
    by_head = [x.transpose(0, 1).flatten(1) for x in (span, high - low)]
    widest = by_head[0].argmax(-1, keepdim=True)
    span, rise = (x.gather(-1, widest)[:, 0] for x in by_head)
    slopes = torch.where(span > 0, rise / span, 0.0)
    index = torch.arange(mask.shape[-1])
    line = mask - slopes[:, None, None] * index
    left = line - line.gather(-1, first[..., None])
    largest = torch.where(keep, mask.abs(), 0.0).amax((0, 2, 3))
    rounding = _ROUNDINGS * torch.finfo(torch.float32).eps * largest
    fits = torch.where(keep, left.abs() <= rounding[:, None, None], (left <= LOWEST) | ~keep.any(-1, keepdim=True))
    if not fits.all():
        example = float(mask[added][0]) if added.any() else float(mask[~fits][0])
        raise Unproved(f"the mask adds a bias, for example {example:.4g}, that is no line over the keys")
    unknown = span == 0
    return keep.view(value.shape), Slopes(
        slopes.masked_fill(unknown, float("nan")), (rounding / span.clamp(min=1)).masked_fill(unknown, float("nan"))
    )


def no_slopes(keep: Tensor) -> Slopes:
    """The slopes of a mask that adds nothing to what it keeps, [..., queries, keys]: zeros."""
    heads = keep.shape[-3] if keep.dim() > 2 else 1
    seen = keep.reshape(-1, heads, *keep.shape[-2:]).sum(-1)
    several = (seen > 1).flatten(2).any(-1).any(0)
    values = torch.where(several, 0.0, float("nan")).double()
    return Slopes(values, values)


def common_slopes(found: Sequence[tuple[str, Slopes]]) -> tuple[float, ...] | None:
    """The slopes that several evaluations of one mask share, rounded to float32.

    Args:
        found: Where each evaluation was, for reasons, and its slopes.

    Returns:
        One a head, or one for all; None where the mask adds nothing at all.

    Raises:
        Unproved: They differ by more than rounding, or nothing tells that of some head.
    """
    if not any((slopes.values.nan_to_num() != 0).any() for _, slopes in found):
        return None
    if len({len(slopes.values) for _, slopes in found}) > 1:
        raise Unproved("the mask adds a bias, and its heads are dynamic")
    values, errors = (torch.stack([getattr(slopes, name) for _, slopes in found]) for name in ("values", "errors"))
    known = ~values.isnan()
    best = torch.where(known, errors, float("inf")).argmin(0, keepdim=True)
    if not known.any(0).all():
        raise Unproved("the mask adds a bias, and no query sees two keys that would tell how it grows")
    wanted, error = values.gather(0, best), errors.gather(0, best)
    wrong = known & ((values - wanted).abs() > errors + error)
    if wrong.any():
        row, head = (int(index) for index in wrong.nonzero()[0])
        raise Unproved(
            f"the mask adds a bias that grows by {float(values[row, head]):.4g} a key at {found[row][0]},"
            f" elsewhere by {float(wanted[0, head]):.4g}"
        )
    return tuple(wanted[0].float().tolist())
