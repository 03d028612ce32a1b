"""`block_sparse_attention` on the CPU: for each query block its keys are gathered, then two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    blocks: Tensor,
    rows: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    key_blocks: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and logarithm of the sums, arguments as in the operator, `rows` int64 ``[B, H]`` from its pattern."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(query.shape, dtype=query.dtype)
    lse = torch.full(query.shape[:3], float("-inf"))
    for b in range(batch):
        for h in range(heads):
            row = int(rows[b, h])
            tokens = None if order is None else order[row % len(order)].long()
            q_tokens = torch.arange(queries) if tokens is None else tokens
            k_tokens = torch.arange(key.shape[2]) if tokens is None else tokens
            listed = counts.shape[1] * block_size
            parts = [*q_tokens[:listed].split(block_size), q_tokens[listed:]]
            tail = k_tokens[key_blocks * block_size :]
            k, v = key[b, h // group].float(), value[b, h // group].float()
            for index, part in enumerate(parts):
                if index < counts.shape[1]:
                    kept = blocks[row, index, : int(counts[row, index])].tolist()
                    pieces = [k_tokens[block * block_size : (block + 1) * block_size] for block in kept]
                    chosen = torch.cat([*pieces, tail])
                else:
                    chosen = k_tokens
                part, chosen = part[part >= 0], chosen[chosen >= 0]
                scores = query[b, h, part].float() @ k[chosen].mT * scale
                if key_bias is not None:
                    scores += key_bias[b % len(key_bias), h % key_bias.shape[1], chosen]
                total = scores.logsumexp(-1)
                shares = (scores - total.masked_fill(total == float("-inf"), 0)[:, None]).exp_()
                output[b, h, part] = (shares @ v[chosen]).to(query.dtype)
                lse[b, h, part] = total
    return output, lse
