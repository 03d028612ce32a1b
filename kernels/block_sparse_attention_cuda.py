"""The launch of `block_sparse_attention`'s Triton kernel: tile sizes by device and head_dim, and order of programs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch: queries and keys, which divide a block."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def choose_config(head_dim: int, block_size: int, item_size: int, capability: tuple[int, int]) -> Config:
    """Tiles for ``head_dim`` channels of ``item_size`` bytes in blocks of ``block_size``."""
    if item_size > 2:
        return Config(32, 32, 4, 1)
    if block_size == 64:
        return Config(64, 64, 4, 2)
    return Config(128, 64, 8, 2)


def padded(head_dim: int) -> int:
    """Channels of a tile: the next power of two, at least the 16 that a product takes."""
    return 1 << (max(head_dim, 16) - 1).bit_length()


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    blocks: Tensor,
    pattern: Tensor | None,
    order: Tensor | None,
    key_bias: Tensor | None,
    key_blocks: int,
    block_size: int,
    scale: float | None,
    with_lse: bool,
    config: Config | None = None,
    sort_heads: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel, arguments unchecked, on query's device (the CPU under TRITON_INTERPRET=1).

    Returns:
        The output and, if asked for, the logarithms of the sums; else an empty tensor.
    """
    from .block_sparse_attention_triton import attend_kernel

    batch, heads, queries, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    if scale < 0:  # the kernel takes maxima before it scales
        query, scale = -query, -scale
    query, key, value, counts, blocks = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, counts, blocks)
    )
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3] if with_lse else 0, dtype=torch.float32, device=query.device)
    if order is not None:  # a token that the order leaves out is stored by no program
        output.zero_()
        lse.fill_(float("-inf"))
    if config is None:
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 0)
        config = choose_config(head_dim, block_size, query.element_size(), capability)
    rows, governed = counts.shape
    q_places, k_places = (queries, key.shape[2]) if order is None else (order.shape[1],) * 2
    tiles = -(-q_places // config.block_m)
    if batch * heads * tiles == 0:
        return output, lse
    head_order = counts
    if sort_heads:
        heads_of = torch.arange(batch * heads, device=query.device).remainder(rows)
        if pattern is not None:
            heads_of = pattern.expand(batch, heads).flatten().long()
        head_order = counts.sum(1)[heads_of].argsort(descending=True)
    attend_kernel[(batch * heads * tiles,)](
        query, key, value, counts, blocks,
        counts if pattern is None else pattern.contiguous(), counts if order is None else order.contiguous(),
        lse if key_bias is None else key_bias.contiguous(), head_order, output, lse, scale * math.log2(math.e),
        heads, heads // key.shape[1], rows, governed, key_blocks * block_size, q_places, k_places,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        queries, counts.stride(0), *blocks.stride()[:2],
        heads if pattern is not None and len(pattern) > 1 else 0,
        order.shape[1] if order is not None and len(order) > 1 else 0,
        *(0, 0) if key_bias is None else _bias_strides(key_bias),
        D=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_SIZE=block_size,
        HAS_PATTERN=pattern is not None, HAS_ORDER=order is not None, HAS_BIAS=key_bias is not None, HAS_LSE=with_lse,
        HAS_HEAD_ORDER=sort_heads, WHOLE=key_blocks * block_size <= k_places,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip
    return output, lse


def _bias_strides(key_bias: Tensor) -> tuple[int, int]:
    """Strides of a contiguous bias, 0 along dimensions of size 1."""
    batch, heads, keys = key_bias.shape
    return (heads * keys if batch > 1 else 0), (keys if heads > 1 else 0)
