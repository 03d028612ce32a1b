"""Pictures of sparse video attention: frames, dense above sparse, and the masks of RainFusion's head types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from graphwright.examples.extra import demo_extra
from graphwright.examples.sample_video import write_png_grid
from graphwright.kernels.block_lists import keep_of
from graphwright.kernels.head_patterns import bandwidth_of, head_patterns, row_names, tau_of
from graphwright.kernels.token_order import inverse

BLOCK = 64
SIDE = 384
"""Pixels of a mask along each side."""


def write_frames(path: Path, videos: Mapping[str, Tensor]) -> None:
    """Eight frames of each video, one video a row, in the given order."""
    frames = len(next(iter(videos.values())))
    write_png_grid(path, list(videos.values()), range(0, frames, max(1, frames // 8)))


def write_masks(path: Path, grid: tuple[int, int, int], sparsity: float = 0.5) -> tuple[str, ...]:
    """What a query (row) of each head type attends to, in the model's order of tokens: kept is light.

    Args:
        path: The PNG.
        grid: Frames, height and width in tokens.
        sparsity: RainFusion's.

    Returns:
        The types from left to right.
    """
    orders, counts, blocks = head_patterns(
        *grid, first=0, text=0, block_size=BLOCK, bandwidths=(bandwidth_of(sparsity),), tau=tau_of(sparsity)
    )
    tokens = grid[0] * grid[1] * grid[2]
    key_blocks = (tokens - tokens // grid[0]) // BLOCK
    tiles = [
        _picture(keep_of(count, block, key_blocks), order, tokens)
        for order, count, block in zip(orders, counts, blocks, strict=True)
    ]
    gap = torch.full((SIDE, 8), 0.5)
    with demo_extra():
        from PIL import Image
    row = torch.cat([part for tile in tiles for part in (tile, gap)][:-1], 1)
    Image.fromarray((row * 255).round().to(torch.uint8).numpy()).save(path, format="PNG")
    return row_names(1)


def _picture(keep: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Share of kept pairs in each pixel, [SIDE, SIDE]."""
    governed = keep.shape[-1]
    whole = torch.ones(governed + 1, governed + 1, dtype=torch.bool)
    whole[:governed, :governed] = keep
    block = (inverse(order, tokens) // BLOCK).clamp(max=governed)
    return functional.adaptive_avg_pool2d(whole[block][:, block][None].float(), SIDE)[0]
