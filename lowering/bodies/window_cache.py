"""Traceable bodies of the windowed cache: the operators' formulas where positions are not read.

The operators look at positions to cut slices; a graph cannot, so here which position each slot holds is arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.window_cache import slots_before_sinks, window_of


def window_cache_append_body(
    store: Tensor, positions: Tensor, new: Tensor, sinks: int, starts: Tensor | None = None
) -> Tensor:
    """`window_cache_append`: what leaves the ring and what comes, by the positions before and after the call."""
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
    slopes: Tensor | None = None,
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
    if slopes is not None:
        sinks_at = (begin + torch.arange(sinks, device=query.device)).expand(len(begin), -1)
        stored = torch.cat([torch.zeros_like(begin), sinks_at, held.expand(len(begin), -1)], 1)
        at = torch.cat([stored, positions.expand(len(begin), -1)], 1)[:, None]
        bias = bias + slopes[:, None, None] * (at - positions[:, None])[:, None]
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
