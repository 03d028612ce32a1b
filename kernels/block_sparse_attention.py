"""Attention over lists of key blocks: each query block of each head attends to the key blocks that its list names.

    keys(q)        = blocks[r, q, :counts[r, q]] and all positions from key_blocks * block_size on     for q < Q
                   = all positions                                              for the queries behind block Q - 1
    s[i, j]        = scale * sum_d query[b, h, i, d] key[b, g, j, d] + key_bias[b, h, j]       for j in keys(block of i)
    output[b, h, i] = sum_j exp(s[i, j] - lse[i]) value[b, g, j],     lse[b, h, i] = log sum_j exp(s[i, j])

with the row r = pattern[b, h] of the lists and the key head g = h // (H / G).

    query     [B, H, N, D]       float32, float16 or bfloat16
    key       [B, G, M, D]       query's dtype; G divides H
    value     [B, G, M, D]       query's dtype
    counts    int32 [R, Q]       how many key blocks query block q keeps
    blocks    int32 [R, Q, W]    the kept key blocks in the first counts[r, q] places, ascending, less than key_blocks
    pattern   int32, int64 [1|B, H]   unset: R is 1, H (r = h) or B * H (r = b * H + h)
    order     int32 [1|R, P]     the token at each position, -1 at an empty one; unset: positions are tokens. N = M
    key_bias  float32 [1|B, 1|H, M]   by token; -inf takes a key out

Positions are cut into blocks of block_size, 64 or 128; the last may be partial. Tokens that everybody attends to, and
that attend to everybody (text, a first frame), stand behind the listed blocks: they are the dense tails. Results are
written to the token's own place, so queries, keys, values and the output stay in the order of the model. A query that
keeps no key gives 0 and an lse of -inf, and so does a token that the order leaves out, which is no key either.

Lists and patterns stay on their device; on CUDA nothing waits for them. No score map is stored, but by `reference`;
with an order, queries, keys and values are copied once.
Error: scores and both sums are float32; weights are rounded to 16 bits before the second product where values have 16.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1, with its loop over key blocks led by lists, as in
FlexAttention's BlockMask (arXiv:2412.05496); the dense tails are the protected tokens of RainFusion (arXiv:2505.21036).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .block_lists import keep_of
from .block_sparse_attention_cpu import attend
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register

CONTRACT = Contract(
    "block_sparse_attention",
    {
        "query": Argument("B H N D", FLOATS),
        "key": Argument("B G M D", FLOATS),
        "value": Argument("B G M D", FLOATS),
        "counts": Argument("R Q", (torch.int32,)),
        "blocks": Argument("R Q W", (torch.int32,)),
        "pattern": Argument("1|B H", (torch.int32, torch.int64), optional=True),
        "order": Argument("1|R P", (torch.int32,), optional=True),
        "key_bias": Argument("1|B 1|H M", (torch.float32,), optional=True),
    },
    # 256 channels are what a tile of the Triton kernel holds in registers.
    sizes={
        "D": Size(minimum=1, maximum=256),
        "G": Size(minimum=1),
        "H": Size(multiple_of="G"),
        "block_size": Size(one_of=(64, 128)),
        "key_blocks": Size(minimum=0),
    },
    capability=(8, 0),
)
LSE_CONTRACT = replace(CONTRACT, operator="block_sparse_attention_lse")


class Tensors(NamedTuple):
    """The tensors that both operators take, in their order."""

    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor
    blocks: Tensor
    pattern: Tensor | None = None
    order: Tensor | None = None
    key_bias: Tensor | None = None


CROSSOVER = {"cpu": {1024: 0.55, 2048: 0.65, 4096: 0.75}, "cuda": {8192: 0.75}}
"""Device -> least number of keys -> density from which on dense attention is faster; with fewer keys it always is.

"cpu" was measured on one core of a Sapphire Rapids, 4 heads of 64, float32, blocks of 128. Times the dense speed at
densities about 0.25, 0.6, 0.75 and 0.9: for 512 tokens 0.86, 0.71, 0.58, 0.53; 1024: 1.56, 0.91, 0.78, 0.74; 2048:
1.86, 1.07, 0.90, 0.80; 4096: 2.21, 1.29, 1.02, 0.87. Blocks of 64 cross at 0.4, 0.55, 0.6. In bfloat16 on AMX dense
attention gains more: 4096 tokens cross at 0.4 in blocks of 128.

"cuda" on an H100, 24 heads, bfloat16, random lists, the launch included, against the faster of cuDNN and flash. At
densities 0.25, 0.5, 0.75, with 128 channels in blocks of 128: for 2048 tokens 0.32, 0.29, 0.28; 4096: 0.72, 0.65, 0.68;
8192: 2.64, 1.48, 1.01; 16384: 2.90, 1.61, 1.08. Blocks of 64 cross at 0.65, with 64 channels above 0.75. What is short
waits for the launch, which takes 0.4 ms.
"""


def dense_is_faster(device_type: str, keys: int, density: float) -> str | None:
    """The reason why dense attention is expected to be faster there, or ``None``: what rewrites ask.

    Args:
        device_type: "cpu" or "cuda".
        keys: M.
        density: Share of the N x M map that is kept (`block_lists.density`).
    """
    known = CROSSOVER.get(device_type)
    if known is None:
        return None
    limits = [limit for length, limit in known.items() if keys >= length]
    if not limits:
        return f"dense attention is faster below {min(known)} tokens on {device_type}, this one has {keys}"
    if density < limits[-1]:
        return None
    return (
        f"dense attention is faster from density {limits[-1]} on at {keys} tokens on {device_type}, got {density:.2f}"
    )


def reference(*tensors: Any, key_blocks: int, block_size: int, scale: float | None = None) -> Tensor:
    """The formula in float32 operators (float64 for float64); it stores the score maps of all heads."""
    return reference_lse(*tensors, key_blocks=key_blocks, block_size=block_size, scale=scale)[0]


def reference_lse(*tensors: Any, key_blocks: int, block_size: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`reference` and the logarithm of each query's sum ``[B, H, N]``."""
    query, key, value, counts, blocks, pattern, order, key_bias = Tensors(*tensors)
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(dtype), *(t.to(dtype).repeat_interleave(group, 1) for t in (key, value))
    kept = _kept_tokens(counts, blocks, order, queries, key.shape[2], key_blocks, block_size)
    scores = q @ k.mT * (head_dim**-0.5 if scale is None else scale)
    if key_bias is not None:
        scores = scores + key_bias[:, :, None]
    scores = scores.masked_fill(~kept[list_rows(pattern, len(counts), batch, heads, query.device)], float("-inf"))
    lse = scores.logsumexp(-1)
    shares = (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
    return (shares @ v).to(query.dtype), lse


def list_rows(pattern: Tensor | None, rows: int, batch: int, heads: int, device: torch.device) -> Tensor:
    """The row of the lists of each head, int64 ``[B, H]``."""
    if pattern is not None:
        return pattern.long().expand(batch, heads)
    return torch.arange(batch * heads, device=device).remainder(rows).view(batch, heads)


def _kept_tokens(
    counts: Tensor, blocks: Tensor, order: Tensor | None, queries: int, keys: int, key_blocks: int, block_size: int
) -> Tensor:
    """Which query token attends to which key token, bool ``[R, N, M]``."""
    rows, governed = counts.shape
    q_places, k_places = (queries, keys) if order is None else (order.shape[1],) * 2
    q_blocks = (torch.arange(q_places, device=counts.device) // block_size).clamp(max=governed)
    k_blocks = (torch.arange(k_places, device=counts.device) // block_size).clamp(max=key_blocks)
    keep = torch.ones((rows, governed + 1, key_blocks + 1), dtype=torch.bool, device=counts.device)
    keep[:, :-1, :-1] = keep_of(counts, blocks, key_blocks)
    kept = keep[:, q_blocks][:, :, k_blocks]
    if order is None:
        return kept
    # Empty positions are written to a token behind the last, which is cut off.
    tokens = torch.where(order < 0, queries, order).long().expand(rows, -1)
    index = torch.arange(rows, device=counts.device)[:, None, None]
    by_token = kept.new_zeros((rows, queries + 1, queries + 1))
    by_token[index, tokens[:, :, None], tokens[:, None, :]] = kept
    return by_token[:, :-1, :-1]


@torch.library.custom_op("graphwright::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    blocks: Tensor,
    pattern: Tensor | None = None,
    order: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    key_blocks: int,
    block_size: int,
    scale: float | None = None,
) -> Tensor:
    """Attention over lists of key blocks; shapes and dtypes of the tensors as in the module.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, G, M, D]``.
        value: ``[B, G, M, D]``.
        counts: ``[R, Q]``.
        blocks: ``[R, Q, W]``.
        pattern: ``[1|B, H]``.
        order: ``[1|R, P]``.
        key_bias: ``[1|B, 1|H, M]``.
        key_blocks: Key blocks that the lists govern; every query attends to what is behind them.
        block_size: Positions of a block, 64 or 128.
        scale: Factor of the products, ``1 / sqrt(D)`` if unset.

    Returns:
        ``[B, H, N, D]`` in query's dtype.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold, or sizes that do not fit each other.
        MissingKernel: No kernel for query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


@torch.library.custom_op("graphwright::block_sparse_attention_lse", mutates_args=())
def block_sparse_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    blocks: Tensor,
    pattern: Tensor | None = None,
    order: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    key_blocks: int,
    block_size: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention`, and the natural logarithm of each query's sum, float32 ``[B, H, N]``."""
    raise missing_kernel(LSE_CONTRACT.operator, query.device)


@block_sparse_attention.register_fake
def _fake(*tensors: Any, key_blocks: int, block_size: int, scale: float | None = None) -> Tensor:
    query = _required(CONTRACT, tensors, key_blocks, block_size, proved=False).query
    return query.new_empty(query.shape)


@block_sparse_attention_lse.register_fake
def _fake_lse(*tensors: Any, key_blocks: int, block_size: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    query = _required(LSE_CONTRACT, tensors, key_blocks, block_size, proved=False).query
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _cpu(*tensors: Any, key_blocks: int, block_size: int, scale: float | None = None) -> Tensor:
    return _run_on_cpu(CONTRACT, tensors, key_blocks, block_size, scale)[0]


def _cpu_lse(*tensors: Any, key_blocks: int, block_size: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    return _run_on_cpu(LSE_CONTRACT, tensors, key_blocks, block_size, scale)


def _cuda(*tensors: Any, key_blocks: int, block_size: int, scale: float | None = None) -> Tensor:
    return _run_on_cuda(CONTRACT, tensors, key_blocks, block_size, scale)[0]


def _cuda_lse(*tensors: Any, key_blocks: int, block_size: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    return _run_on_cuda(LSE_CONTRACT, tensors, key_blocks, block_size, scale)


def _run_on_cpu(
    contract: Contract, tensors: Sequence[Any], key_blocks: int, block_size: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    given = _required(contract, tensors, key_blocks, block_size)
    query, key, value, counts, blocks, pattern, order, key_bias = given
    batch, heads, _, head_dim = query.shape
    rows = list_rows(pattern, len(counts), batch, heads, query.device)
    factor = head_dim**-0.5 if scale is None else scale
    return attend(query, key, value, counts, blocks, rows, order, key_bias, key_blocks, block_size, factor)


def _run_on_cuda(
    contract: Contract, tensors: Sequence[Any], key_blocks: int, block_size: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    device = Tensors(*tensors).query.device
    with contract.on_cuda(device):
        from .block_sparse_attention_cuda import launch

        given = _required(contract, tensors, key_blocks, block_size)
        return launch(*given, key_blocks, block_size, scale, with_lse=contract is LSE_CONTRACT)


def _required(
    contract: Contract,
    tensors: Sequence[Any],
    key_blocks: int,
    block_size: int,
    proved: bool = True,
) -> Tensors:
    """The tensors by name, if the contract holds and sizes fit each other; raises InvalidArgument."""
    given = Tensors(*tensors)
    contract.require(**given._asdict(), key_blocks=key_blocks, block_size=block_size, proved=proved)
    reason = _misfit(given, key_blocks, block_size)
    if reason is not None:
        raise InvalidArgument(f"{contract.operator}: {reason}")
    return given


def _misfit(given: Tensors, key_blocks: int, block_size: int) -> str | None:
    """The first relation between arguments that fails; symbolic sizes are not compared."""
    query, key, value, counts, _, pattern, order, _ = given
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            return f"got {name} of {tensor.dtype}, expected {query.dtype} as query has"
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    rows, governed = counts.shape
    if pattern is None and _known(rows, batch, heads) and rows not in (1, heads, batch * heads):
        return f"got {rows} rows of lists and no pattern, expected 1, {heads} or {batch * heads} rows"
    if order is not None:
        if _known(queries, keys) and queries != keys:
            return f"got an order, {queries} queries and {keys} keys, expected as many queries as keys"
        queries = keys = order.shape[1]
    for name, number, length in (("Q", governed, queries), ("key_blocks", key_blocks, keys)):
        if _known(number, length) and number > -(-length // block_size):
            return f"got {name}={number}, expected at most the {-(-length // block_size)} blocks of {length} positions"
    return None


def _known(*sizes: int) -> bool:
    return all(isinstance(size, int) for size in sizes)


# Not register_kernel, whose check of each result for aliases costs microseconds a call.
torch.library.impl("graphwright::block_sparse_attention", "cpu", _cpu)
torch.library.impl("graphwright::block_sparse_attention", "cuda", _cuda)
torch.library.impl("graphwright::block_sparse_attention_lse", "cpu", _cpu_lse)
torch.library.impl("graphwright::block_sparse_attention_lse", "cuda", _cuda_lse)
register(torch.ops.graphwright.block_sparse_attention.default, reference, CONTRACT)
register(torch.ops.graphwright.block_sparse_attention_lse.default, reference_lse, LSE_CONTRACT)
