"""Block lists: for each query block the key blocks that it keeps, as the operator `block_sparse_attention` reads them.

    keep   bool  [..., Q, K]      keep[q, k]: query block q attends to key block k
    counts int32 [..., Q]         counts[q] = sum_k keep[q, k]
    blocks int32 [..., Q, W]      blocks[q, :counts[q]] are the kept k, ascending; what follows is ignored, here 0

Plain torch with shapes that do not depend on data: it can be traced, and nothing waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lists_of(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of a map of kept blocks.

    Args:
        keep: bool ``[..., Q, K]``.

    Returns:
        counts int32 ``[..., Q]`` and blocks int32 ``[..., Q, K]``.
    """
    places = keep.cumsum(-1, dtype=torch.int32)
    counts = keep.sum(-1, dtype=torch.int32)
    width = keep.shape[-1]
    numbers = torch.arange(width, dtype=torch.int32, device=keep.device).expand(keep.shape)
    # Blocks that are not kept are written to a place of their own behind the list, which is cut off.
    target = torch.where(keep, places - 1, width).long()
    blocks = numbers.new_zeros((*keep.shape[:-1], width + 1)).scatter(-1, target, numbers)
    return counts, blocks[..., :width].contiguous()


def keep_of(counts: Tensor, blocks: Tensor, key_blocks: int) -> Tensor:
    """The map of kept blocks of some lists, the inverse of `lists_of`.

    Args:
        counts: int32 ``[..., Q]``.
        blocks: int32 ``[..., Q, W]``.
        key_blocks: K; entries of the lists are less.

    Returns:
        bool ``[..., Q, K]``.
    """
    listed = torch.arange(blocks.shape[-1], device=blocks.device) < counts[..., None]
    target = torch.where(listed, blocks, key_blocks).long()
    keep = torch.zeros((*counts.shape, key_blocks + 1), dtype=torch.bool, device=counts.device)
    return keep.scatter(-1, target, True)[..., :key_blocks].contiguous()


def density(counts: Tensor, key_blocks: int, queries: int, keys: int, block_size: int) -> float:
    """The share of the score map that is computed, the mean of all rows of the lists; dense tails count as computed.

    Args:
        counts: int32 ``[..., Q]``; query blocks from Q on are dense.
        key_blocks: Key blocks that the lists govern; every query attends to what is behind them.
        queries: N, or the number of positions where there is a token order.
        keys: M, likewise.
        block_size: Tokens of a block. A last block that is cut counts as whole, up to all keys.

    Returns:
        A number in [0, 1]; 1 for an empty map.
    """
    if queries == 0 or keys == 0 or counts.numel() == 0:
        return 1.0
    governed = counts.shape[-1]
    first = torch.arange(governed) * block_size
    rows = (queries - first).clamp(0, block_size).double()
    tail = max(keys - key_blocks * block_size, 0)
    kept = (counts.detach().cpu().double() * block_size + tail).clamp(max=keys)
    computed = float((kept * rows).sum(-1).mean())
    dense_rows = max(queries - governed * block_size, 0)
    return (computed + float(dense_rows) * keys) / (float(queries) * keys)
