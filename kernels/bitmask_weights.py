"""A sparse weight as one bit a place and the values that are not zero.

    bits    uint8 [N, ceil(K / 8)]: bit k % 8 of byte k / 8 is 1 where weight[n, k] is stored
    values  [nnz], row by row, in the weight's dtype
    starts  int64 [N + 1]: where each row's values begin

At a share z of zeros, float32 takes 1/32 + (1 - z) of the dense bytes: 0.43 at 60%.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument


class Bitmask(NamedTuple):
    """A compressed weight [N, K]."""

    bits: Tensor
    values: Tensor
    starts: Tensor


def compress(weight: Tensor) -> Bitmask:
    """Compress a weight [N, K] of any float dtype; what is stored is what is not zero.

    Raises:
        InvalidArgument: It is no float matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InvalidArgument(f"got a weight {weight.dtype}{list(weight.shape)}, expected a float matrix [N, K]")
    kept = weight.detach() != 0
    padded = torch.nn.functional.pad(kept, (0, -weight.shape[1] % 8))
    places = 1 << torch.arange(8, dtype=torch.uint8, device=weight.device)
    bits = (padded.view(len(weight), -1, 8).to(torch.uint8) * places).sum(-1, dtype=torch.uint8)
    starts = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
    starts[1:] = kept.sum(1).cumsum(0)
    return Bitmask(bits, weight.detach()[kept], starts)


def decompress(bits: Tensor, values: Tensor, k: int) -> Tensor:
    """The dense weight [N, k]."""
    places = torch.arange(8, device=bits.device)
    kept = ((bits[:, :, None] >> places) & 1).bool().flatten(1)[:, :k]
    weight = values.new_zeros(len(bits), k)
    weight[kept] = values
    return weight


def bitmask_reason(bits: Tensor, values: Tensor, starts: Tensor, rows: int, columns: int) -> str | None:
    """Why three tensors are no compressed weight [rows, columns], or None: files may hold anything."""
    wanted = {"bits": (rows, -(-columns // 8)), "starts": (rows + 1,)}
    for name, tensor, dtype in (("bits", bits, torch.uint8), ("starts", starts, torch.int64)):
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != dtype:
            return f"{name} are {tensor.dtype}{list(tensor.shape)}, expected {dtype}{list(wanted[name])}"
    if values.dim() != 1 or not values.is_floating_point():
        return f"values are {values.dtype}{list(values.shape)}, expected floats [nnz]"
    places = torch.arange(8, device=bits.device)
    kept = ((bits[:, :, None] >> places) & 1).flatten(1)
    if bool(kept[:, columns:].any()):
        return f"bits beyond {columns} channels are set"
    counted = torch.zeros(rows + 1, dtype=torch.int64, device=bits.device)
    counted[1:] = kept.sum(1).cumsum(0)
    if not torch.equal(counted, starts) or int(starts[-1]) != len(values):
        return f"bits, starts and {len(values)} values do not count the same"
    return None
