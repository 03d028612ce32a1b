"""Traceable bodies of the packed and windowed caches: the operators' formulas where positions are not read.

The operators look at positions to cut slices; a graph cannot, so here indices are computed and every write has a fixed
size. What is computed is the same, byte for byte of a store up to rounding of the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.packed_cache import GROUP, Form, Packing, dequantize, packings, quantize
from ..kernels.window_cache import slots_before_sinks, window_of


def cache_append_body(store: Tensor, positions: Tensor, new: Tensor, bits: int, form: Form) -> Tensor:
    """`cache_append`: the bytes of each token are written where they lie, in a copy of the store."""
    packing = Packing(bits, form, int(new.shape[-1]))
    capacity = packing.capacity(int(store.shape[-1]))
    steps_at = capacity * packing.row
    if not packing.has_tail:
        codes, steps = quantize(new, packing)
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
    codes, steps = quantize(tokens, packing)
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


def window_cache_append_body(
    store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None
) -> Tensor:
    """`window_cache_append`: which position each slot holds before and after the call is arithmetic."""
    window = int(window_of(store.shape[2], sinks, store.dtype))
    lead = slots_before_sinks(store.dtype)
    mean = store[:, :, 0] if lead == 1 else store[:, :, : lead - 1].flatten(2).view(torch.float32)
    ring = store[:, :, lead + sinks :]
    begin = positions.new_zeros(1) if starts is None else starts
    first, tokens = positions[:1], new.shape[2]
    stop = first + tokens
    slots = torch.arange(window, device=store.device)
    low = torch.maximum((begin + sinks)[:, None], (first - window).clamp(min=0))
    high = stop - window
    before_at, after_at = _held(first, slots, window), _held(stop, slots, window)
    left = ((before_at >= low) & (before_at < high)).float()
    passed = ((positions >= low) & (positions < high)).float()
    leaving = (left[:, None, None] @ ring.float() + passed[:, None, None] @ new.float()).squeeze(2)
    after = (stop - window - sinks - begin).clamp(min=0).float()[:, None, None]
    count = (high - low).clamp(min=0).float()[..., None]
    updated = (mean * (after - count) + leaving) / after.clamp(min=1)
    mean = torch.where(count > 0, updated, mean)
    fresh = new[:, :, (after_at - first).clamp(min=0)]
    ring = torch.where((after_at >= first)[:, None], fresh, ring)
    sink = begin[:, None] + torch.arange(sinks, device=store.device) - first
    index = sink.clamp(min=0).minimum(torch.full_like(sink[:1, :1], tokens - 1))
    index = index[:, None, :, None].expand(store.shape[0], store.shape[1], sinks, store.shape[3])
    comes = ((sink >= 0) & (sink < tokens))[:, None, :, None]
    first_tokens = torch.where(comes, new.gather(2, index), store[:, :, lead : lead + sinks])
    stand = mean[:, :, None].to(store.dtype)
    if lead == 1:
        return torch.cat([stand, first_tokens, ring], 2)
    stand = torch.where((count > 0)[..., None], stand, store[:, :, lead - 1 : lead])
    wide = mean.contiguous().view(store.dtype).unflatten(-1, (lead - 1, store.shape[3]))
    return torch.cat([wide, stand, first_tokens, ring], 2)


def window_cache_attention_body(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    positions: Tensor,
    sinks: int,
    scale: float,
    compensate: bool = True,
    starts: Tensor | None = None,
) -> Tensor:
    """`window_cache_attention`: all tokens that are kept, side by side, one softmax over a bias."""
    window, lead = int(window_of(key.shape[2], sinks, key.dtype)), slots_before_sinks(key.dtype) - 1
    repeats = query.shape[1] // key.shape[1]
    keys = _repeated(torch.cat([key[:, :, lead:], new_key], 2).float(), repeats)
    values = _repeated(torch.cat([value[:, :, lead:], new_value], 2).float(), repeats)
    begin = (positions.new_zeros(1) if starts is None else starts)[:, None]
    first = positions[:1]
    gone = (first - window - begin - sinks).clamp(min=0)
    stands = gone.float().log() if compensate else torch.full_like(gone.float(), float("-inf"))
    sees_sink = begin + torch.arange(sinks, device=query.device) < first
    held = _held(first, torch.arange(window, device=query.device), window)
    sees_ring = (held >= 0) & (held >= begin + sinks)
    sees_old = torch.cat([sees_sink, sees_ring], 1)
    old = torch.cat([stands, torch.where(sees_old, 0.0, float("-inf"))], 1)[:, None]
    sees_new = (positions <= positions[:, None]) & (positions >= begin[:, None])
    own = torch.where(sees_new, 0.0, float("-inf"))
    bias = torch.cat([old.expand(-1, own.shape[1], -1), own], -1)[:, None]
    weights = (query.float() @ keys.mT * scale + bias).softmax(-1)
    # A query in the padding sees nothing at all.
    weights = weights.masked_fill((bias == float("-inf")).all(-1, keepdim=True), 0.0)
    return (weights @ values).to(query.dtype)


def _held(stop: Tensor, slots: Tensor, window: int) -> Tensor:
    """The last position before `stop` that each slot of a ring holds; negative where none was written."""
    newest = stop - 1
    # Shifted by whole turns, since the remainder of a negative number is not everywhere the same.
    return newest - (newest + window - slots) % window


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
