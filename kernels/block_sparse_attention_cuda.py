"""`block_sparse_attention` on CUDA: tile sizes by device and head_dim, and the launch of its Triton kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch: queries and keys, which divide a block.

    ``max_registers`` a thread is what ptxas is told; ``descriptors``: tiles are read by tensor descriptors.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    descriptors: bool = False


def choose_config(head_dim: int, block_size: int, item_size: int, capability: tuple[int, int]) -> Config:
    """Tiles for ``head_dim`` channels of ``item_size`` bytes in blocks of ``block_size``.

    16-bit tiles of up to 128 channels leave room for two programs on a multiprocessor, since one computes its softmax
    while the other multiplies. On an H100, [1, 24, 32760, 128] in bfloat16 at density 0.25, milliseconds and share of
    what cuDNN's dense attention takes for as many products:

        block 128     128 queries x 64 keys, 8 warps, 128 registers         6.1  0.88   (by pointers 5.8, but it spills)
                      the same with 186 registers, so one program           9.4  0.57
                      128 x 32, 8 warps, 128 registers                      7.8  0.68
                      128 x 128, 8 warps                                    7.5  0.71
                      64 x 64, 4 warps                                      9.0  0.59
        block 64      64 x 64, 4 warps, two or three stages                 7.2  0.74    (by pointers 8.3)
                      64 x 32, 4 warps                                      9.1  0.59

    With 64 channels it is 0.90 and 0.99. Tiles for other devices were chosen by what ptxas says of them.
    """
    channels = padded(head_dim)
    if item_size > 2:  # the three products of tf32 hold many registers
        rows = {128: 32, 256: 16}.get(channels, 64)
        return Config(rows, min(rows, 32), 4, 1)
    if (9, 0) <= capability < (12, 0):
        if channels > 128:
            return Config(64, 32, 4, 2, None, True)
        if block_size == 64:
            return Config(64, 64, 4, 2, None, True)
        return Config(128, 64, 8, 2, 128, True)
    if channels > 128:
        return Config(32, 32, 4, 2)
    return Config(64, 32 if channels == 128 else 64, 4, 2)


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
    capability: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernels, arguments unchecked, on query's device (the CPU under TRITON_INTERPRET=1).

    Tiles are those of query's device, or of one of ``capability``.

    Returns:
        The output and, if asked for, the logarithms of the sums; else an empty tensor.
    """
    from .block_sparse_attention_triton import attend_kernel

    batch, heads, queries, head_dim = query.shape
    factor = head_dim**-0.5 if scale is None else scale
    if factor < 0:  # the kernel takes maxima before it scales
        query, factor = -query, -factor
    factor = max(factor * math.log2(math.e), 1e-20)  # zero times the -inf of a masked key would be NaN
    query, counts, blocks = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, counts, blocks))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3] if with_lse else (0,), dtype=torch.float32, device=query.device)
    if order is not None:  # a token that the order leaves out is stored by no program
        output.zero_()
        lse.fill_(float("-inf"))
    rows, governed = counts.shape
    q_places, k_places = (queries, key.shape[2]) if order is None else (order.shape[1],) * 2
    if capability is None:
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 0)
    config = choose_config(head_dim, block_size, query.element_size(), capability)
    tiles = -(-q_places // config.block_m)
    if batch * heads * tiles == 0:
        return output, lse
    if k_places == 0:
        return output.zero_(), lse.fill_(float("-inf"))

    of_head = _rows_of_heads(pattern, rows, batch, heads, query.device)
    pattern = None if pattern is None else pattern.contiguous()
    held = counts
    if order is not None:
        order = order.contiguous()
        tokens, held = _front(order, block_size)
        share = heads // key.shape[1] if len(order) == 1 else 1
        query = _ordered(query, order, pattern, heads, 1, rows)
        key, value = (_ordered(t, tokens, pattern, heads, share, rows) for t in (key, value))
        key_bias = None if key_bias is None else _ordered_bias(key_bias, tokens, of_head, batch)
    query, key, value = (_loadable(t, config.descriptors) for t in (query, key, value))
    sources: list[Any] = [query, key, value]
    if config.descriptors:
        tile_rows = (config.block_m, config.block_n, config.block_n)
        sources = [_descriptor(t, number) for t, number in zip(sources, tile_rows, strict=True)]
    key_bias = None if key_bias is None else key_bias.contiguous()
    sort = rows > 1  # heads with long lists first, so that the last programs are short
    head_order = counts.sum(1)[of_head].argsort(descending=True) if sort else counts
    attend_kernel[(batch * heads * tiles,)](
        *sources, counts, blocks,
        counts if pattern is None else pattern, counts if order is None else order, held,
        lse if key_bias is None else key_bias, head_order, output, lse, factor,
        heads, heads // key.shape[1], rows, governed, key_blocks * block_size, q_places, k_places,
        *query.stride()[:3], *key.stride()[:2], *value.stride()[:2], *output.stride()[:3],
        queries, counts.stride(0), *blocks.stride()[:2],
        heads if pattern is not None and len(pattern) > 1 else 0,
        *(0, 0) if order is None or len(order) == 1 else (order.shape[1], held.shape[1]),
        *(0, 0) if key_bias is None else _bias_strides(key_bias),
        key_n=key.stride(2), value_n=value.stride(2),
        D=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_SIZE=block_size,
        DESCRIPTORS=config.descriptors, HAS_PATTERN=pattern is not None, HAS_ORDER=order is not None,
        HAS_BIAS=key_bias is not None, HAS_LSE=with_lse, HAS_HEAD_ORDER=sort,
        WHOLE=key_blocks * block_size <= k_places,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip
    return output, lse


def _rows_of_heads(pattern: Tensor | None, rows: int, batch: int, heads: int, device: torch.device) -> Tensor:
    """The row of the lists of each head, int64 ``[B * H]``."""
    if pattern is not None:
        return pattern.expand(batch, heads).flatten().long()
    return torch.arange(batch * heads, device=device).remainder(rows)


def _front(order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The order int32 ``[1|R, P]`` with the tokens of each block before its empty positions, and their number a block.

    Attention to a block does not depend on the order of keys inside it.
    """
    from .block_sparse_attention_triton import front_kernel

    rows, places = order.shape
    blocks = -(-places // block_size)
    front = torch.empty_like(order)
    held = torch.empty((rows, blocks), dtype=torch.int32, device=order.device)
    front_kernel[(blocks, rows)](order, front, held, places, BLOCK_SIZE=block_size)
    return front, held


def _ordered(rows: Tensor, order: Tensor, pattern: Tensor | None, heads: int, share: int, lists: int) -> Tensor:
    """Rows by position ``[B, H / share, P, D]`` of ``[B, G, N, D]``, for query heads that share them and an order."""
    from .block_sparse_attention_triton import order_kernel

    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    batch, kinds, _, head_dim = rows.shape
    places = order.shape[1]
    channels = -(-head_dim // _ALIGNED) * _ALIGNED
    ordered = rows.new_empty((batch, heads // share, places, channels))[..., :head_dim]
    order_kernel[(-(-places // 64), batch * heads // share)](
        rows, order, order if pattern is None else pattern, ordered, heads, heads // kinds, share, lists, places,
        *rows.stride()[:3], *ordered.stride()[1:3], heads if pattern is not None and len(pattern) > 1 else 0,
        places if len(order) > 1 else 0, D=head_dim, BLOCK_D=padded(head_dim), HAS_PATTERN=pattern is not None,
    )  # fmt: skip
    return ordered


def _ordered_bias(key_bias: Tensor, order: Tensor, of_head: Tensor, batch: int) -> Tensor:
    """The bias by position, -inf where no key stands: ``[1|B, 1|H, P]``, or ``[B, H, P]`` with an order a row."""
    if len(order) == 1:
        tokens = order[None].expand(*key_bias.shape[:2], -1)
    else:
        tokens = order[of_head].unflatten(0, (batch, -1))
    ordered = key_bias.expand(*tokens.shape[:2], -1).gather(2, tokens.clamp(min=0).long())
    return ordered.masked_fill_(tokens < 0, float("-inf"))


def _loadable(tensor: Tensor, descriptors: bool) -> Tensor:
    """A tensor ``[B, G, P, D]`` as it is or, if the kernel cannot load it so, as a copy."""
    rows = zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    strides = [stride * tensor.element_size() for stride, size in rows if size > 1]
    aligned = tensor.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)
    if tensor.stride(3) == 1 and (aligned or not descriptors):
        return tensor
    head_dim = tensor.shape[3]
    copy = tensor.new_empty((*tensor.shape[:3], -(-head_dim // _ALIGNED) * _ALIGNED))[..., :head_dim]
    return copy.copy_(tensor)


def _descriptor(tensor: Tensor, block_n: int) -> Any:
    """What the copy engine reads tiles of ``block_n`` positions of a head by."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # The stride of a dimension of size 1 can be anything, but for the copy engine.
    rows = zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    strides = [stride if size > 1 else tensor.stride(2) for stride, size in rows]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, block_n, padded(tensor.shape[3])])


def _bias_strides(key_bias: Tensor) -> tuple[int, int]:
    """Strides of a contiguous bias ``[1|B, 1|H, P]``, 0 along dimensions of size 1."""
    batch, heads, places = key_bias.shape
    return heads * places if batch > 1 else 0, places if heads > 1 else 0


_ALIGNED = 8
"""Channels that a copied row is filled up to: 16 bytes of 16-bit numbers, as the copy engine wants them."""
