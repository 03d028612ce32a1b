"""The Triton kernel of `snap_tokens` and `token_roots`: every element goes back to its root, three steps at most.

One program takes some tokens of one head, with all their channels. Nothing but the result is stored: the windows of a
token lie next to it, so what is read again is in the cache.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_jit: Callable[..., Any] = triton.jit
_ELEMENTS, _WARPS = 2048, 4
"""Tokens times channels of a program: of each an address, a value and a flag are held; twice as many can spill."""


def block_tokens(channels: int) -> int:
    """Tokens of a program."""
    return _ELEMENTS // max(int(triton.next_power_of_2(channels)), 64)


def launch(
    x: Tensor, theta: Tensor, groups: Sequence[int], factors: Sequence[float], grid: Sequence[int], first: int,
    axes: Sequence[int], window: int, granularity: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    snapped = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels = torch.tensor(groups, device=x.device)
    group = torch.arange(len(groups), dtype=torch.int32, device=x.device).repeat_interleave(channels)
    factor = torch.tensor(factors, dtype=torch.float32, device=x.device).repeat_interleave(channels)
    shared = {"element": 0, "group": len(groups), "token": 1}[granularity]
    if granularity == "token":
        group = torch.zeros_like(group)
    blocks = -(-x.shape[2] // block_tokens(x.shape[3]))
    counts = torch.empty((*x.shape[:2], blocks, x.shape[3]), dtype=torch.int32, device=x.device)
    _run(x, theta, group, factor, snapped, counts, grid, first, axes, window, shared, roots=False)
    return snapped, counts.sum(2, dtype=torch.int32)


def launch_roots(x: Tensor, theta: Tensor, grid: Sequence[int], first: int, axes: Sequence[int], window: int) -> Tensor:
    """The roots of whole tokens."""
    roots = torch.empty(x.shape[:3], dtype=torch.int32, device=x.device)
    group = torch.zeros(x.shape[3], dtype=torch.int32, device=x.device)
    factor = torch.ones(x.shape[3], dtype=torch.float32, device=x.device)
    _run(x, theta, group, factor, roots, roots, grid, first, axes, window, 1, roots=True)
    return roots


def _run(
    x: Tensor, theta: Tensor, group: Tensor, factor: Tensor, out: Tensor, counts: Tensor, grid: Sequence[int],
    first: int, axes: Sequence[int], window: int, shared: int, *, roots: bool,
) -> None:  # fmt: skip
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, channels = x.shape
    if not out.numel():
        return
    block = block_tokens(channels)
    _snap_kernel[(-(-tokens // block), batch * heads)](
        x, theta, group, factor, out, counts, heads, tokens, *grid, first, *x.stride()[:3], channels,
        ALONG_T=0 in axes, ALONG_H=1 in axes, ALONG_W=2 in axes, WINDOW=window, SHARED=shared, ROOTS=roots,
        BLOCK_N=block, BLOCK_D=triton.next_power_of_2(channels), num_warps=_WARPS,
    )  # fmt: skip


@_jit
def _delta(x, at, step, holds, WINDOW: tl.constexpr):
    """Standard deviation over the window that begins at these addresses."""
    one = tl.load(x + at, mask=holds, other=0.0).to(tl.float32)
    if WINDOW == 2:
        return tl.abs(one - tl.load(x + at + step, mask=holds, other=0.0).to(tl.float32)) * 0.5
    total = one
    for k in tl.static_range(WINDOW - 1):  # pyright: ignore[reportGeneralTypeIssues] unrolled by Triton
        total += tl.load(x + at + (k + 1) * step, mask=holds, other=0.0).to(tl.float32)
    mean = total / WINDOW
    squares = (one - mean) * (one - mean)
    for k in tl.static_range(WINDOW - 1):  # pyright: ignore[reportGeneralTypeIssues]
        off = tl.load(x + at + (k + 1) * step, mask=holds, other=0.0).to(tl.float32) - mean
        squares += off * off
    return tl.sqrt(squares / WINDOW)


@_jit
def _parent(x, limit, group, root, parent, holds, size, stride, row, cs, WINDOW: tl.constexpr, SHARED: tl.constexpr):
    """The first of the window along one axis where it is flagged, else what is the parent so far."""
    at = root // stride % size
    behind = at % WINDOW
    start = root - behind * stride
    inside = holds & (behind != 0) & (at - behind + WINDOW <= size)
    delta = _delta(x, start.to(tl.int64) * row + cs[None, :], tl.cast(stride, tl.int64) * row, inside, WINDOW)
    if SHARED > 0:
        squares = delta * delta
        shared = tl.zeros_like(delta)
        for g in tl.static_range(SHARED):
            own = (group == g)[None, :]
            mean = tl.sum(tl.where(own, squares, 0.0), 1) / tl.sum((group == g).to(tl.float32), 0)
            shared = tl.where(own, tl.sqrt(mean)[:, None], shared)
        delta = shared
    return tl.where(inside & (delta < limit[None, :]), start, parent)


@_jit
def _snap_kernel(
    x, theta, groups, factors, out, counts, H, N, frames, height, width, first,
    x_b, x_h, x_n, D: tl.constexpr,
    ALONG_T: tl.constexpr, ALONG_H: tl.constexpr, ALONG_W: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr,
    ROOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head; `out` is snapped tokens [B, H, N, D] or, with ROOTS, roots [B, H, N]."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    x += head // H * x_b + head % H * x_h
    tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
    cs = tl.arange(0, BLOCK_D)
    channel = cs < D
    group = tl.load(groups + cs, mask=channel, other=-1)
    limit = tl.load(factors + cs, mask=channel, other=0.0) * tl.load(theta)
    video = (tokens >= first) & (tokens < first + frames * height * width)
    holds = video[:, None] & channel[None, :]
    base = x + first * tl.cast(x_n, tl.int64)
    root = (tokens - first)[:, None] + tl.zeros([BLOCK_N, BLOCK_D], tl.int32)
    one = frames * 0 + 1
    for _ in tl.static_range(ALONG_T + ALONG_H + ALONG_W):
        parent = root
        if ALONG_W:
            parent = _parent(base, limit, group, root, parent, holds, width, one, x_n, cs, WINDOW, SHARED)
        if ALONG_H:
            parent = _parent(base, limit, group, root, parent, holds, height, width, x_n, cs, WINDOW, SHARED)
        if ALONG_T:
            parent = _parent(base, limit, group, root, parent, holds, frames, height * width, x_n, cs, WINDOW, SHARED)
        root = parent
    root += first
    if ROOTS:
        token = tl.max(tl.where(channel[None, :], root, -1), 1)
        tl.store(out + head * N + tokens, token, mask=tokens < N)
    else:
        within = (tokens < N)[:, None] & channel[None, :]
        value = tl.load(x + root.to(tl.int64) * x_n + cs[None, :], mask=within, other=0.0)
        place = (head * N + tokens.to(tl.int64))[:, None] * D + cs[None, :]
        tl.store(out + place, value, mask=within)
        moved = tl.sum((holds & (root != tokens[:, None])).to(tl.int32), 0)
        at = (head * tl.num_programs(0) + block) * D + cs
        tl.store(counts + at, moved, mask=channel)
