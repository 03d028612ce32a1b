"""A paged key-value cache as one tensor of keys and one of values, in the order of tokens.

    key[b, h, i], value[b, h, i] = page i // page of the slow pool, at i % page;     of the newest page the fast pool

Shapes: slow ``[B, P, H, 2, page, D]``; fast ``[B, S, 2, page, H, D]``; tables ``[B, H, S + P]`` (``page_tables.py``);
positions ``[N]``, the last of which is the newest token's; key and value ``[B, H, length, D]``, zero after the newest
token's page. Dtypes: slow, fast, key and value one of float32, float16, bfloat16; tables int32, positions int64.

For calls that bring several tokens to a cache that is not empty: they look at everything, one layer's cache at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .slow_pool import FilePool, TensorPool, pool_of

CONTRACT = Contract(
    "page_gather",
    {
        "slow": Argument("B P H 2 page D", FLOATS),
        "fast": Argument("B S 2 page H D", FLOATS),
        "tables": Argument("B H R", (torch.int32,)),
        "positions": Argument("N", (torch.int64,)),
    },
    sizes={"2": Size(minimum=2, maximum=2), "N": Size(minimum=1), "length": Size(minimum=1)},
    devices=("cpu",),
)


def reference(slow: Tensor, fast: Tensor, tables: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The formula, page by page."""
    CONTRACT.require(slow=slow, fast=fast, tables=tables, positions=positions, length=length)
    batch, pages, heads, _, page, dim = slow.shape
    newest = int(positions[-1]) // page
    both = slow.new_zeros(2, batch, heads, pages * page, dim)
    for number in range(newest + 1):
        tokens = slice(number * page, (number + 1) * page)
        both[:, :, :, tokens] = slow[:, number].permute(2, 0, 1, 3, 4)
        if number == newest:
            for b in range(batch):
                for h in range(heads):
                    slot = int(tables[b, h, fast.shape[1] + number])
                    both[:, b, h, tokens] = fast[b, slot, :, :, h]
    return both[0, :, :, :length].clone(), both[1, :, :, :length].clone()


@torch.library.custom_op("graphwright::page_gather", mutates_args=())
def page_gather(slow: Tensor, fast: Tensor, tables: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, length, D]`` of a paged cache.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for the fast pool's device.
    """
    raise missing_kernel(CONTRACT.operator, fast.device)


@page_gather.register_fake
def _fake(slow: Tensor, fast: Tensor, tables: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    CONTRACT.require(slow=slow, fast=fast, tables=tables, positions=positions, length=length, proved=False)
    batch, _, heads, _, _, dim = slow.shape
    return fast.new_empty(batch, heads, length, dim), fast.new_empty(batch, heads, length, dim)


def _cpu(slow: Tensor, fast: Tensor, tables: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    CONTRACT.require(slow=slow, fast=fast, tables=tables, positions=positions, length=length)
    pool: FilePool | TensorPool = pool_of(slow)
    batch, pages, heads, _, page, dim = slow.shape
    newest = int(positions[-1]) // page
    both = fast.new_zeros(2, batch, heads, pages, page, dim)
    both[:, :, :, :newest] = pool.read(newest).permute(3, 0, 2, 1, 4, 5)
    slot = tables[..., fast.shape[1] + newest].long()
    b, h = torch.arange(batch)[:, None], torch.arange(heads)
    both[:, :, :, newest] = fast[b, slot, :, :, h].permute(2, 0, 1, 3, 4)
    key, value = both.flatten(3, 4)[..., :length, :].unbind(0)
    return key.contiguous(), value.contiguous()


torch.library.impl("graphwright::page_gather", "cpu", _cpu)
register(torch.ops.graphwright.page_gather.default, reference, CONTRACT)
