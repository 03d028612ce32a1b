"""Traceable bodies of the packed cache: the operators' formulas where positions are not read.

The operators look at positions to cut slices; a graph cannot, so here indices are computed and every write has a fixed
size. What is computed is the same, byte for byte of a store up to rounding of the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.packed_cache import FLOOR, GROUP, Form, Packing, dequantize, pack, packings


def cache_append_body(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: Form) -> Tensor:
    """`cache_append`: the bytes of each token are written where they lie, in a copy of the store."""
    packing = Packing(bits, form, int(new.shape[-1]))
    capacity = packing.capacity(int(store.shape[-1]))
    steps_at = capacity * packing.row
    if not packing.has_tail:
        codes, steps = _quantized(new, packing)
        store = _write(store, positions * packing.row, packing.row, codes.flatten(2))
        return _write(store, steps_at + positions * 4, 4, _bytes(steps).flatten(2))
    tail = packing.planes(store).tail
    assert tail is not None
    first = positions[:1]
    held = first % GROUP
    start = first - held
    count = held + new.shape[2]
    # Blocks that may be touched; those that are not whole yet are computed, and written back as they were.
    blocks = (new.shape[2] + GROUP - 2) // GROUP + 1
    order = torch.arange(blocks, device=new.device).clamp(max=capacity // GROUP - 1 - start // GROUP)
    places = (order[:, None] * GROUP + torch.arange(GROUP, device=new.device)).flatten()
    tokens = _joined(tail, new.half(), places, held)
    whole = (order + 1) * GROUP <= count
    codes, steps = _quantized(tokens, packing)
    size = GROUP * packing.row
    store = _write_some(store, (start + order * GROUP) * packing.row, size, codes.reshape(*store.shape[:2], -1), whole)
    size = packing.token_bytes * GROUP - size
    made = _bytes(steps).reshape(*store.shape[:2], -1)
    store = _write_some(store, steps_at + (start // GROUP + order) * size, size, made, whole)
    last = (count - 1) // GROUP * GROUP
    slots = torch.arange(GROUP, device=new.device)
    fresh = _joined(tail, new.half(), last + slots, held)
    kept = torch.where((last + slots < count)[:, None], fresh, tail)
    return torch.cat([store[..., : store.shape[-1] - packing.tail_bytes], _bytes(kept).flatten(2)], -1)


def quantized_cache_attention_body(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    key_bits: int,
    value_bits: int,
    mode: str,
    value_dim: int,
    scale: float,
    window: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """`quantized_cache_attention`: everything dequantized, one softmax over a mask."""
    keys_as, values_as = packings(mode, key_bits, value_bits, int(query.shape[-1]), value_dim)
    cut = positions[-1:] // GROUP * GROUP
    keys, values = _whole(key, keys_as, cut), _whole(value, values_as, cut)
    repeats = query.shape[1] // key.shape[1]
    j = torch.arange(keys.shape[2], device=query.device)
    hidden = j > positions[:, None]
    if window:
        hidden = hidden | (j <= positions[:, None] - window)
    if starts is not None:
        hidden = hidden | (j < starts[:, None, None, None])
    scores = query.float() @ _repeated(keys, repeats).mT * scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    # What was never written may be anything, and zero times NaN is no zero.
    values = torch.where((j <= positions[-1:])[:, None], _repeated(values, repeats), 0.0)
    return (weights @ values).to(query.dtype)


def _quantized(x: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Codes and steps of tokens, as `packed_cache.quantize` makes them."""
    if packing.form == "per_channel":
        grouped, dim = x.float().unflatten(-2, (x.shape[-2] // GROUP, GROUP)), -2
    else:
        size = GROUP if packing.form == "per_group" else packing.head_dim
        grouped, dim = x.float().unflatten(-1, (packing.head_dim // size, size)), -1
    low, high = grouped.amin(dim, keepdim=True), grouped.amax(dim, keepdim=True)
    most = 2**packing.bits - 1
    scale, low = ((high - low).clamp_min(FLOOR) / most).half(), low.half()
    codes = ((grouped - low.float()) / scale.float()).round().clamp(0, most).to(torch.uint8)
    return pack(codes.reshape(x.shape), packing.bits), torch.stack((scale, low), -1).squeeze(dim - 1)


def _repeated(x: Tensor, repeats: int) -> Tensor:
    """Each head `repeats` times."""
    return x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _whole(store: Tensor, packing: Packing, cut: Tensor) -> Tensor:
    planes = packing.planes(store)
    tokens = dequantize(planes.codes, planes.steps, packing)
    if planes.tail is None:
        return tokens
    j = torch.arange(tokens.shape[2], device=store.device)
    recent = (j >= cut) & (j < cut + GROUP)
    return torch.where(recent[:, None], planes.tail.float()[:, :, j % GROUP], tokens)


def _joined(tail: Tensor, new: Tensor, places: Tensor, held: Tensor) -> Tensor:
    """Tokens at some places of a block's beginning: the first `held` are the tail's, the others new."""
    index = (places - held).clamp(min=0)
    # Places behind the last new token are read by nobody.
    index = index.minimum(torch.full_like(index[:1], new.shape[2] - 1))
    return torch.where((places < held)[:, None], tail[:, :, places.clamp(max=GROUP - 1)], new[:, :, index])


def _write(store: Tensor, at: Tensor, size: int, content: Tensor) -> Tensor:
    """The store with runs of `size` bytes written at some addresses."""
    return store.index_copy(2, _addresses(at, size), content)


def _write_some(store: Tensor, at: Tensor, size: int, content: Tensor, chosen: Tensor) -> Tensor:
    """`_write` of the runs that are chosen; the others stay as they are."""
    addresses = _addresses(at, size)
    old = store.index_select(2, addresses)
    mask = chosen[:, None].expand(-1, size).flatten()
    return store.index_copy(2, addresses, torch.where(mask, content, old))


def _addresses(at: Tensor, size: int) -> Tensor:
    return (at[:, None] + torch.arange(size, device=at.device)).flatten()


def _bytes(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.uint8)
