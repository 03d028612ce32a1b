"""Weights of 4 bits: how they are rounded, packed two to a byte, and made 8 bits again.

    weight[n, k] ~ scale[n] step[k // g, n] q[n, k]          q in -8..7, step a whole number in 1..16, scale float32

The scale of a group is a whole multiple of its channel's: `step q` fits 8 bits exactly, so that an 8-bit integer
product runs over all of K at once and scales are applied once, at its end (QServe, Lin et al. 2024, arXiv:2405.04532,
section 4.1, does the same with an 8-bit first level). With free scales the product would have to stop at each group.

    packed[b, k, i] = q[64 b + i, k] + 8  |  (q[64 b + 32 + i, k] + 8) << 4        uint8 [ceil(N / 64), K, 32]

That is the order in which PyTorch's own CPU product of 4-bit weights reads them where there is AVX-512, so one file
serves all devices; channels are padded to 64 with zeros. Bytes a weight: 1/2 + 1/g, and 8 a channel; at g = 64 and K =
576 that is 0.132 of float32.

Rounding: the scale is clipped so that the sum of |error|^2.4 over a group is least (the search of QuaRot's and
DartQuant's code: Ashkboos et al. 2024, arXiv:2404.00456; arXiv:2511.04063). Here the candidates are the steps 1..16
themselves, and for the channel's largest group shrinks of its maximum down to 0.7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument

STEPS = 16
"""Largest step: -8 * 16 is the least int8."""
ROWS = 64
"""Channels in one packed block."""
GROUPS = (32, 64, 128, 256)
"""Group sizes that the kernels take; PyTorch's CPU product has the same."""
_POWER = 2.4
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_TINY = torch.finfo(torch.float32).tiny


class Int4(NamedTuple):
    """A packed weight.

    Attributes:
        packed: uint8 [ceil(N / 64), K, 32].
        steps: int8 [K / g, ceil(N / 64) * 64], 1 where padded.
        scale: float32 [N].
        sums: int32 [N], the sum over k of step q: what an asymmetric activation's zero point is multiplied with.
    """

    packed: Tensor
    steps: Tensor
    scale: Tensor
    sums: Tensor


def quantize_groups(weight: Tensor, group: int) -> Int4:
    """Round a weight [N, K] to 4 bits, each group by itself.

    Raises:
        InvalidArgument: The weight is no finite float matrix, or the group does not divide K or is none of ``GROUPS``.
    """
    check(weight, group)
    scale = channel_scale(weight, group)
    values, steps = [], []
    for rows, row_scale in zip(weight.detach().split(ROWS), scale.split(ROWS), strict=True):
        groups = rows.float().unflatten(1, (-1, group))
        step = group_steps(groups, row_scale[:, None])
        values.append(rounded(groups, step[..., None] * row_scale[:, None, None]).flatten(1))
        steps.append(step)
    return pack(torch.cat(values).to(torch.int8), torch.cat(steps).to(torch.int8), scale)


def check(weight: Tensor, group: int) -> None:
    """Refuse a weight or a group that cannot be quantized, with the reason."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise InvalidArgument(
            f"got a weight {weight.dtype} of shape {list(weight.shape)}, expected a float matrix [N, K]"
        )
    reason = group_reason(weight.shape[1], group)
    if reason is not None:
        raise InvalidArgument(reason)
    bad = (~weight.detach().isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        raise InvalidArgument(f"the weight has NaN or infinity in output channels {bad[:8]}, expected finite values")


def group_reason(channels: int, group: int) -> str | None:
    """Why input channels cannot be taken in groups of this size, or None."""
    if group in GROUPS and channels % group == 0:
        return None
    fitting = [str(size) for size in GROUPS if channels % size == 0]
    return f"groups of {group} do not divide {channels} channels; {' or '.join(fitting) or 'no group'} does"


def channel_scale(weight: Tensor, group: int, importance: Tensor | None = None) -> Tensor:
    """The scale [N] of each channel of [N, K]: its largest group, clipped for least error, takes step 16.

    `importance` [K] says what an error of each input channel costs; errors are squared then.
    """
    groups = weight.detach().float().unflatten(1, (-1, group))
    largest = groups.abs().amax(-1).argmax(1)
    chosen = groups[torch.arange(len(groups), device=groups.device), largest]
    costs = None if importance is None else importance.unflatten(0, (-1, group))[largest]
    top = (chosen.abs().amax(-1) / 7).clamp_min(_TINY * STEPS)
    tried = torch.stack([top * shrink for shrink in _SHRINKS])
    errors = torch.stack([_error(chosen, scale[:, None], costs) for scale in tried])
    best = tried.gather(0, errors.argmin(0, keepdim=True))[0]
    return best / STEPS


def group_steps(groups: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """The step, float32 [..], of groups [.., g] whose channels have a scale [..]: the one with the least error.

    `importance` [g] as in `channel_scale`.
    """
    best = torch.full(groups.shape[:-1], float("inf"), device=groups.device)
    chosen = torch.ones_like(best)
    for step in range(1, STEPS + 1):
        error = _error(groups, (scale * step).expand(best.shape)[..., None], importance)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, float(step), chosen)
    return chosen


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """The nearest q in -8..7, as floats."""
    return (values / scale).round().clamp(-8, 7)


def _error(values: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
    error = rounded(values, scale).mul_(scale).sub_(values)
    return error.abs_().pow_(_POWER).sum(-1) if importance is None else error.square_().mul_(importance).sum(-1)


def pack(values: Tensor, steps: Tensor, scale: Tensor) -> Int4:
    """Pack q int8 [N, K] with steps int8 [N, K / g] and scale [N]."""
    n, k = values.shape
    group = k // steps.shape[1]
    sums = (values.int() * steps.int().repeat_interleave(group, 1)).sum(1).int()
    padding = -n % ROWS
    unsigned = torch.nn.functional.pad((values + 8).to(torch.uint8), (0, 0, 0, padding), value=8)
    blocks = unsigned.view(-1, 2, ROWS // 2, k)
    packed = (blocks[:, 0] | (blocks[:, 1] << 4)).transpose(1, 2).contiguous()
    padded = torch.nn.functional.pad(steps, (0, 0, 0, padding), value=1).t().contiguous()
    return Int4(packed, padded, scale.float().contiguous(), sums)


def unpack(packed: Tensor, steps: Tensor) -> Tensor:
    """step q as int8 [K, P], P the padded number of channels: the right factor of an integer product.

    Eight nibbles at a time, since 64-bit shifts are fast and 8-bit ones are not: 0.2 ms for 1536 x 576 on one thread of
    a Xeon, where shifting bytes took 0.35.
    """
    blocks, k, _ = packed.shape
    words = packed.view(torch.int64)
    made = torch.empty(k, blocks, 2, words.shape[-1], dtype=torch.int64, device=packed.device)
    made[:, :, 0] = torch.bitwise_and(words, _NIBBLES).transpose(0, 1)
    made[:, :, 1] = torch.bitwise_right_shift(words, 4).bitwise_and_(_NIBBLES).transpose(0, 1)
    result = made.view(torch.int8).view(len(steps), k // len(steps), blocks * ROWS)
    return result.sub_(8).mul_(steps[:, None]).view(k, -1)


_NIBBLES = 0x0F0F0F0F0F0F0F0F


def dequantized(weight: Int4) -> Tensor:
    """The float32 weight [N, K] that a packed one stands for."""
    n = len(weight.scale)
    return unpack(weight.packed, weight.steps)[:, :n].t().float() * weight.scale[:, None]
