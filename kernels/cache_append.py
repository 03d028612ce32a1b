"""Append new tokens to one half of a packed key-value cache: each is quantized once, when it is written.

    store'[positions] = quantize(new)

Shapes: store ``[B, H, R]``, R the bytes of a head (``packed_cache.py`` has their order); positions ``[T]``,
consecutive; new ``[B, H, T, D]``. Dtypes: store uint8, positions int64, new float32, float16 or bfloat16.

With the form ``per_token`` a token is packed at once. With ``per_channel`` and ``per_group`` the tokens of the last
block of 32 are kept in float16, and the block is packed when its 32nd token comes; until the next token comes the tail
still holds it, so that a query sees its own block in float16 whatever its place in it. Appending tokens one by one, in
pieces or at once gives the same bytes.

``cache_append_`` does it in place; lowering puts it where nobody reads the old store any more.

Source: ``packed_cache.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .packed_cache import GROUP, Form, Packing, quantize

CONTRACT = Contract(
    "cache_append",
    {
        "store": Argument("B H R", (torch.uint8,)),
        "positions": Argument("T", (torch.int64,)),
        "new": Argument("B H T D", FLOATS),
    },
    sizes={"D": Size(minimum=8, multiple_of=8), "bits": Size(one_of=(8, 4, 2))},
)


def reference(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: Form) -> Tensor:
    """The store after the tokens were appended."""
    return append(store.clone(), positions, new, bits, form)


@torch.library.custom_op("graphwright::cache_append", mutates_args=())
def cache_append(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: str) -> Tensor:
    """The store uint8 ``[B, H, R]`` with tokens ``[B, H, T, D]`` packed at positions ``[T]``.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold, or a position that the store does not have.
        MissingKernel: No kernel for the store's device.
    """
    raise missing_kernel(CONTRACT.operator, store.device)


@cache_append.register_fake
def _fake(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: str) -> Tensor:
    CONTRACT.require(store=store, positions=positions, new=new, bits=bits, proved=False)
    Packing(bits, form, int(new.shape[-1])).require()  # pyright: ignore[reportArgumentType] (checked there)
    return torch.empty_like(store)


def _cuda(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: Form) -> Tensor:
    return _cuda_in_place(store.clone(), positions, new, bits, form)


def _cuda_in_place(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: Form) -> Tensor:
    """The Triton kernels; positions are not looked at, since reading them would wait for the device."""
    with CONTRACT.on_cuda(store.device):
        from .cache_append_triton import launch

        CONTRACT.require(store=store, positions=positions, new=new, bits=bits)
        Packing(bits, form, new.shape[-1]).require()
        return launch(store, positions, new, bits, form)


def append(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: Form) -> Tensor:
    """Append in place, and return the store."""
    CONTRACT.require(store=store, positions=positions, new=new, bits=bits)
    packing = Packing(bits, form, new.shape[-1])
    packing.require()
    if new.shape[2] == 0:
        return store
    first, stop = int(positions[0]), int(positions[0]) + new.shape[2]
    capacity = packing.capacity(store.shape[-1])
    if first < 0 or stop > capacity:
        raise InvalidArgument(f"cache_append: positions {first} to {stop - 1} do not fit a cache of {capacity} tokens")
    planes = packing.planes(store)
    if planes.tail is None:
        codes, steps = quantize(new, packing)
        planes.codes[:, :, first:stop] = codes
        planes.steps[:, :, first:stop] = steps
        return store
    start = first - first % GROUP
    # From what the tail holds, not from `new`: a block is the same however many calls brought it.
    tokens = torch.cat([planes.tail[:, :, : first - start], new.half()], 2)
    whole = tokens.shape[2] // GROUP * GROUP
    if whole:
        codes, steps = quantize(tokens[:, :, :whole], packing)
        unit = GROUP if form == "per_channel" else 1
        planes.codes[:, :, start : start + whole] = codes
        planes.steps[:, :, start // unit : (start + whole) // unit] = steps
    last = (tokens.shape[2] - 1) // GROUP * GROUP
    planes.tail[:, :, : tokens.shape[2] - last] = tokens[:, :, last:]
    return store


# Not custom_op: the in-place twin returns its argument, as aten's do, so that it can take the place of a value.
torch.library.define(
    "graphwright::cache_append_", "(Tensor(a!) store, Tensor positions, Tensor new, int bits, str form) -> Tensor(a!)"
)
torch.library.impl("graphwright::cache_append_", "cpu", append)
torch.library.impl("graphwright::cache_append_", "cuda", _cuda_in_place)
torch.library.impl("graphwright::cache_append", "cpu", reference)
torch.library.impl("graphwright::cache_append", "cuda", _cuda)
register(torch.ops.graphwright.cache_append.default, reference, CONTRACT)
