"""Traceable bodies of orders and lists of video tokens, for grids whose frames are known when it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.block_lists import lists_of

_FAR = 1 << 40
"""Beyond any token; sorts what is not chosen behind what is."""


def token_order_body(
    like: Tensor,
    kind: str,
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    protect_frame: bool,
    shape: Sequence[int],
) -> Tensor:
    """`token_order`: int32 [1, P]."""
    return _order(kind, frames, height, width, first, text, protect_frame, shape, like.device)[None].int()


def head_patterns_body(
    like: Tensor,
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    block_size: int,
    bandwidths: Sequence[float],
    tau: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_patterns`: orders, counts and blocks of all rows."""
    tokens = (frames - 1) * height * width
    size = tokens // block_size
    device = like.device
    kinds = (("frame_last", ()), ("raster", ()), ("checkerboard", (tau,)))
    orders = [_order(kind, frames, height, width, first, text, True, shape, device) for kind, shape in kinds]
    positions = torch.arange(size, device=device)
    distance = (positions[:, None] - positions[None, :]).abs()
    # floor(share * tokens / block) as the operator rounds it, in float64 there and here.
    length = torch.full((1,), 1.0, dtype=torch.float64, device=device) * tokens
    bands = [distance <= (length * bandwidth / block_size).floor().long() for bandwidth in bandwidths]
    same = sum((row - column) % tau == 0 for row in range(height) for column in range(width))
    sampled = (positions * block_size < (frames - 1) * same).expand(size, size)
    rows = [orders[0]] * len(bands) + [orders[1]] * len(bands) + [orders[2]]
    counts, blocks = lists_of(torch.stack([*bands, *bands, sampled]))
    return torch.stack(rows).int(), counts, blocks


def window_lists_body(windows: Tensor, group: Tensor, *, tiles: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`window_lists`: what is not kept is written behind the list."""
    time, height, width = tiles
    every = torch.arange(time * height * width, device=windows.device)
    at = (every // (height * width), every // width % height, every % width)
    dt, dh, dw = ((axis[:, None] - axis[None, :]).abs() for axis in at)
    sides = windows[:, group.long()[dt.clamp(max=group.shape[0] - 1)]]
    outer_w, inner_h, inner_w, outer_h = (sides[..., side] for side in range(4))
    kept = ((dw <= outer_w) & (dh <= inner_h)) | ((dw <= inner_w) & (dh <= outer_h))
    before = kept.long().cumsum(-1)
    total = before[..., -1:]
    place = torch.where(kept, before - 1, total + every - before)
    blocks = torch.zeros_like(place).scatter(-1, place, every.expand_as(place))
    return total[..., 0].int(), blocks.int()


def _order(
    kind: str,
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    protect_frame: bool,
    shape: Sequence[int],
    device: torch.device,
) -> Tensor:
    tokens = frames * height * width
    raster = torch.arange(tokens, device=device).view(frames, height, width) + first
    kept, protected = (raster[1:], raster[:1]) if protect_frame else (raster, raster[:0])
    if kind == "frame_last":
        ordered = kept.permute(1, 2, 0)
    elif kind == "checkerboard":
        (tau,) = shape or (2,)
        at = torch.arange(height * width, device=device)
        other = (at // width + tau * width - at % width) % tau != 0
        inside = (at + _FAR * other).argsort()
        chosen = sum((row - column) % tau == 0 for row in range(height) for column in range(width))
        flat = kept.flatten(1)[:, inside]
        ordered = torch.cat([flat[:, :chosen].reshape(-1), flat[:, chosen:].reshape(-1)])
    elif kind == "window":
        ordered = _windows(kept, *(shape or (8, 8)))
    elif kind == "tile":
        ordered = _tiles(kept, frames - 1 if protect_frame else frames, height, width, shape)
    else:
        ordered = kept
    before = torch.arange(first, device=device)
    after = torch.arange(text - first, device=device) + (first + tokens)
    return torch.cat([ordered.reshape(-1), protected.reshape(-1), before, after])


def _windows(grid: Tensor, rows: int, columns: int) -> Tensor:
    height, width = grid.shape[1:]
    whole_height, whole_width = height // rows * rows, width // columns * columns
    main = grid[:, :whole_height, :whole_width]
    main = main.unflatten(2, (whole_width // columns, columns)).unflatten(1, (whole_height // rows, rows))
    main = main.transpose(2, 3).flatten(1)
    return torch.cat([main, grid[:, whole_height:].flatten(1), grid[:, :whole_height, whole_width:].flatten(1)], 1)


def _tiles(grid: Tensor, frames: int, height: int, width: int, tile: Sequence[int]) -> Tensor:
    padding = [(-height) % tile[1], (-width) % tile[2]]
    # Frames may be symbolic: a negative remainder of those is written without one.
    missing = (frames + tile[0] - 1) // tile[0] * tile[0] - frames
    padded = torch.nn.functional.pad(grid, [0, padding[1], 0, padding[0], 0, missing], value=-1)
    t, h, w = (frames + missing) // tile[0], (height + padding[0]) // tile[1], (width + padding[1]) // tile[2]
    return padded.reshape(t, tile[0], h, tile[1], w, tile[2]).permute(0, 2, 4, 1, 3, 5)
