"""Attention in which tokens stand for others: equal queries are attended for once, equal keys are one key.

    output[b, h, i] = attention(query[b, h, query_root[b, h, i]];  key[b, g, key_root[b, g, j]], value[b, g, j])

with the key head g = h // (H / G). It is computed on what is left: rows whose root they are themselves, and keys

    k_r,    bias_r = log sum_j exp(bias_j),    v_r = sum_j exp(bias_j) value_j / sum_j exp(bias_j)    for root[j] = r

so a row costs what a row costs, and a key whatever number of keys it stands for: (1 - rq) (1 - rk) of dense attention,
with the shares rq, rk of the rows and keys that are no roots. Exact but for rounding.

    query       [B, H, N, D]     float32, float16 or bfloat16
    key, value  [B, G, M, D]     query's dtype; G divides H
    query_root  int32 [B, H, N]  a token whose root is itself
    key_root    int32 [B, G, M]
    key_bias    float32 [1|B, 1|H, M]   by token, added to the scores; -inf takes a key out

Shapes are static: how many rows are left is no size of a tensor. On the CPU each head is packed and attended to as it
is. On CUDA rows and keys are packed to the front of buffers of N and M rows, and the lists of `block_sparse_attention`
end where they do: nothing waits for the device, nothing can overflow, and blocks that hold nothing are skipped.

On one core of a Sapphire Rapids, 8192 tokens, 64 channels, float32, packed, with the bias as a mask: 1.03 to 1.10 times
the share of dense attention's time; with the bias as another channel 1.2, by the products of block lists 1.3 to 1.4.

Source: the merging of keys is the identity sum_j exp(s + b_j) = exp(s + log sum_j exp(b_j)); that TimeRipple's snapped
tokens (arXiv 2511.12035) can be merged is this implementation's observation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .block_sparse_attention import block_sparse_attention as _sparse
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register

CONTRACT = Contract(
    "collapsed_attention",
    {
        "query": Argument("B H N D", FLOATS),
        "key": Argument("B G M D", FLOATS),
        "value": Argument("B G M D", FLOATS),
        "query_root": Argument("B H N", (torch.int32,)),
        "key_root": Argument("B G M", (torch.int32,)),
        "key_bias": Argument("1|B 1|H M", (torch.float32,), optional=True),
    },
    sizes={
        "D": Size(minimum=1, maximum=256),
        "M": Size(minimum=1),
        "G": Size(minimum=1),
        "H": Size(multiple_of="G"),
    },
)
_BLOCK = 128
_NEVER = float("-inf")


def reference(
    query: Tensor, key: Tensor, value: Tensor, query_root: Tensor, key_root: Tensor, key_bias: Tensor | None = None,
    *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Every token takes its root's place, then dense attention in float32 (float64 for float64)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    q = _gather(query, query_root).to(dtype)
    k, v = (t.to(dtype).repeat_interleave(group, 1) for t in (_gather(key, key_root), value))
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        scores = scores + key_bias[:, :, None]
    return (scores.softmax(-1).nan_to_num(0.0) @ v).to(query.dtype)


@torch.library.custom_op("graphwright::collapsed_attention", mutates_args=())
def collapsed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_root: Tensor,
    key_root: Tensor,
    key_bias: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of roots to roots; shapes and dtypes as in the module.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, G, M, D]``.
        value: ``[B, G, M, D]``.
        query_root: ``[B, H, N]``.
        key_root: ``[B, G, M]``.
        key_bias: ``[1|B, 1|H, M]``.
        scale: Factor of the products, ``1 / sqrt(D)`` if unset.

    Returns:
        ``[B, H, N, D]`` in query's dtype. A query that sees no key gives 0.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


@collapsed_attention.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, query_root: Tensor, key_root: Tensor, key_bias: Tensor | None = None,
    *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    _require(query, key, value, query_root, key_root, key_bias, proved=False)
    return query.new_empty(query.shape)


def _cpu(
    query: Tensor, key: Tensor, value: Tensor, query_root: Tensor, key_root: Tensor, key_bias: Tensor | None = None,
    *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Head by head: the rows that are left, aten's attention with the bias as its mask, and back to all rows."""
    _require(query, key, value, query_root, key_root, key_bias)
    output = query.new_empty(query.shape)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0] if query.numel() else 0):
        for g in range(key.shape[1]):
            kept, slot = _packed(key_root[b, g])
            merged: tuple[Tensor, Tensor] | None = None
            for h in range(g * group, (g + 1) * group):
                if merged is None or (key_bias is not None and key_bias.shape[1] > 1):
                    bias = None if key_bias is None else key_bias[b % len(key_bias), h % key_bias.shape[1]]
                    merged = _merge(value[b, g], slot, len(kept), bias)
                values, weights = merged
                rows, place = _packed(query_root[b, h])
                found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query[b, h][rows][None, None],
                    key[b, g][kept][None, None],
                    values.to(query.dtype)[None, None],
                    attn_mask=weights.log()[None, None, None],
                    scale=scale,
                )
                # Where every key is taken out aten's sums are of nothing.
                found = found[0, 0] if key_bias is None else found[0, 0].masked_fill(lse[0, 0, :, None] == _NEVER, 0)
                torch.index_select(found, 0, place, out=output[b, h])
    return output


def _packed(roots: Tensor) -> tuple[Tensor, Tensor]:
    """The roots in order, int64 ``[n]``, and where among them each token's root stands, ``[N]``."""
    own = roots == torch.arange(len(roots), dtype=roots.dtype, device=roots.device)
    return own.nonzero().squeeze(1), (own.cumsum(0) - 1)[roots.long()]


def _merge(value: Tensor, slot: Tensor, count: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted means of the values that share a slot, float32 ``[count, D]``, and the weights' sums ``[count]``."""
    weight = torch.ones(len(slot)) if bias is None else bias.exp()
    weighted = value.float() if bias is None else value.float() * weight[:, None]
    total = torch.zeros(count).index_add_(0, slot, weight)
    summed = torch.zeros(count, value.shape[1]).index_add_(0, slot, weighted)
    return summed.div_(total.clamp(min=torch.finfo(torch.float32).tiny)[:, None]), total


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, query_root: Tensor, key_root: Tensor, key_bias: Tensor | None = None,
    *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The same with sizes that do not depend on the roots, for devices that should not be waited for.

    Rows and keys stand packed at the front of buffers as long as they were; block lists end where they end.
    """
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    group = heads // kv_heads
    q_order, q_slot, q_count = _to_front(query_root)
    k_order, k_slot, k_count = _to_front(key_root)
    weight = torch.ones_like(key_root, dtype=torch.float32)[:, :, None].expand(-1, -1, group, -1)
    if key_bias is not None:
        weight = key_bias.exp().expand(batch, heads, keys).unflatten(1, (kv_heads, group))
    # Values of a group's query heads differ only where their biases do.
    shared = key_bias is None or key_bias.shape[1] == 1
    weight = weight[:, :, :1] if shared else weight
    slots = k_slot[:, :, None].expand(weight.shape).flatten(0, 2)
    total = torch.zeros(slots.shape, device=query.device)
    row = torch.arange(len(slots), device=query.device)[:, None].expand_as(slots)
    # Sums of few terms, with an order also on CUDA: one that is scattered has none.
    total.index_put_((row, slots), weight.reshape(slots.shape), accumulate=True)
    weighted = (value.float()[:, :, None] * weight[..., None]).flatten(0, 2)
    summed = torch.zeros_like(weighted).index_put_((row, slots), weighted, accumulate=True)
    values = summed / total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    values = values.to(query.dtype).view(batch, -1, keys, value.shape[-1])
    bias = total.log().view(batch, kv_heads, -1, keys).expand(-1, -1, group, -1).flatten(1, 2)
    packed_keys = _gather(key, k_order)
    if not shared:
        packed_keys = packed_keys.repeat_interleave(group, 1)
    blocks = -(-keys // _BLOCK)
    filled = [-(-count.flatten() // _BLOCK) for count in (q_count, k_count.repeat_interleave(group, 1))]
    starts = torch.arange(-(-queries // _BLOCK), device=query.device)
    counts = torch.where(starts < filled[0][:, None], filled[1][:, None], 0).int()
    listed = torch.arange(blocks, dtype=torch.int32, device=query.device).expand(*counts.shape, blocks).contiguous()
    output = _sparse(
        _gather(query, q_order), packed_keys, values, counts, listed, None, None, bias.contiguous(),
        key_blocks=blocks, block_size=_BLOCK, scale=scale,
    )  # fmt: skip
    return _gather(output, q_slot)


def _to_front(roots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with the roots first, the place of each token's root, int64 ``[B, H, N]``, and the number of roots."""
    own = roots == torch.arange(roots.shape[2], dtype=roots.dtype, device=roots.device)
    order = own.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    return order, (own.cumsum(-1) - 1).gather(-1, roots.long()), own.sum(-1)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, H, N, D]`` at int ``[B, H, N]``."""
    return rows.gather(2, index.long()[..., None].expand(*index.shape, rows.shape[3]))


def _cuda(
    query: Tensor, key: Tensor, value: Tensor, query_root: Tensor, key_root: Tensor, key_bias: Tensor | None = None,
    *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    with CONTRACT.on_cuda(query.device):
        _require(query, key, value, query_root, key_root, key_bias)
        return packed_attention(query, key, value, query_root, key_root, key_bias, scale=scale)


def _require(
    query: Tensor, key: Tensor, value: Tensor, query_root: Tensor, key_root: Tensor, key_bias: Tensor | None,
    proved: bool = True,
) -> None:  # fmt: skip
    CONTRACT.require(
        query=query, key=key, value=value, query_root=query_root, key_root=key_root, key_bias=key_bias, proved=proved
    )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise InvalidArgument(
                f"{CONTRACT.operator}: got {name} of {tensor.dtype}, expected {query.dtype} as query has"
            )


torch.library.impl("graphwright::collapsed_attention", "cpu", _cpu)
torch.library.impl("graphwright::collapsed_attention", "cuda", _cuda)
register(torch.ops.graphwright.collapsed_attention.default, reference, CONTRACT)
