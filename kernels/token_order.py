"""Orders of video tokens: which token stands at each position, so that what attends to each other stands together.

Tokens of a model are in raster order (t, h, w), w fastest, with text before or after the video. An order is an int32
index ``[P]``: the token at each position, -1 where a position is empty (padding). Orders without padding are
permutations of all tokens; ``inverse`` undoes them. Text, and for some methods the first frame, goes to the end, where
the sparse operator treats it densely ("protected").

raster        (t, h, w) as it is
frame_last    (h, w, t): one place in all frames together (RainFusion, arXiv 2505.21036: temporal heads)
checkerboard  first the tokens with i mod tau = j mod tau inside their frame, then the others (its textural heads)
window        each frame cut into windows of 8x8, what does not fit a window behind them: bottom rows, right columns
              (RainFusion 2.0, arXiv 2512.24086, and its code)
tile          3D tiles in raster order, the grid padded to whole tiles (Compact Attention, arXiv 2508.12969; Sliding
              Tile Attention, arXiv 2502.04507)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, register

OrderKind = Literal["raster", "frame_last", "checkerboard", "window", "tile"]


def token_order(
    kind: OrderKind,
    frames: int,
    height: int,
    width: int,
    *,
    first: int = 0,
    text: int = 0,
    protect_frame: bool = False,
    shape: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
) -> Tensor:
    """The token at each position.

    Args:
        kind: See the module.
        frames: Frames of the grid.
        height: Tokens of a frame, vertically.
        width: Tokens of a frame, horizontally.
        first: Index of the first video token in the model's sequence; the tokens before it are text.
        text: Number of all tokens that are no video; those that do not stand before the video stand after it.
        protect_frame: Put the first frame behind the others.
        shape: The tile (t, h, w) of `tile`, the window (h, w) of `window`, (tau,) of `checkerboard`; (8, 8) and (2,) by
            default.
        device: Where the index is wanted.

    Returns:
        int32 [P], video first, then the first frame where it is protected, then text in its order. P is frames * height
        * width + text, more where `tile` pads.

    Raises:
        InvalidArgument: The kind is unknown, or a size is not positive.
    """
    if kind not in get_args(OrderKind):
        raise InvalidArgument(f"unknown token order {kind!r}; there are {', '.join(get_args(OrderKind))}")
    if min(frames, height, width) < 1 or not 0 <= first <= text or any(size < 1 for size in shape):
        raise InvalidArgument(
            f"got a grid of {frames} x {height} x {width}, {text} text tokens, {first} of them first, and {shape}"
        )
    return _cached(kind, frames, height, width, first, text, protect_frame, tuple(shape), str(device))


def inverse(order: Tensor, tokens: int) -> Tensor:
    """The position of each token, int64 [tokens], for an order int32 [P] that holds every token once."""
    positions = torch.arange(len(order), device=order.device)
    held = order >= 0
    return torch.empty(tokens, dtype=torch.int64, device=order.device).scatter_(0, order[held].long(), positions[held])


@lru_cache(maxsize=64)  # an order is asked for by every layer of every phase
def _cached(
    kind: OrderKind,
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    protect_frame: bool,
    shape: tuple[int, ...],
    device: str,
) -> Tensor:
    raster = torch.arange(frames * height * width).view(frames, height, width) + first
    kept, protected = (raster[1:], raster[:1]) if protect_frame else (raster, raster[:0])
    if kind == "frame_last":
        ordered = kept.permute(1, 2, 0)
    elif kind == "checkerboard":
        ordered = _checkerboard(kept, *(shape or (2,)))
    elif kind == "window":
        ordered = _windows(kept, *(shape or (8, 8)))
    elif kind == "tile":
        ordered = _tiles(kept, *shape)
    else:
        ordered = kept
    before, after = torch.arange(first), torch.arange(first + raster.numel(), raster.numel() + text)
    return torch.cat([ordered.reshape(-1), protected.reshape(-1), before, after]).int().to(device)


def _checkerboard(grid: Tensor, tau: int) -> Tensor:
    _, height, width = grid.shape
    same = (torch.arange(height)[:, None] - torch.arange(width)[None, :]) % tau == 0
    return torch.cat([grid[:, same].reshape(-1), grid[:, ~same].reshape(-1)])


def _windows(grid: Tensor, rows: int, columns: int) -> Tensor:
    frames, height, width = grid.shape
    whole_height, whole_width = height // rows * rows, width // columns * columns
    main = grid[:, :whole_height, :whole_width]
    main = main.reshape(frames, whole_height // rows, rows, whole_width // columns, columns).transpose(2, 3)
    bottom, right = grid[:, whole_height:], grid[:, :whole_height, whole_width:]
    return torch.cat([part.reshape(frames, part[0].numel() if frames else 0) for part in (main, bottom, right)], 1)


def _tiles(grid: Tensor, *tile: int) -> Tensor:
    if len(tile) != 3:
        raise InvalidArgument(f"a tile has three sizes (t, h, w), got {tile}")
    padding = [size for length, part in zip(grid.shape[::-1], tile[::-1], strict=True) for size in (0, -length % part)]
    padded = torch.nn.functional.pad(grid, padding, value=-1)
    (t, a), (h, b), (w, c) = ((length // part, part) for length, part in zip(padded.shape, tile, strict=True))
    return padded.view(t, a, h, b, w, c).permute(0, 2, 4, 1, 3, 5)


@torch.library.custom_op("graphwright::token_order", mutates_args=())
def token_order_op(
    like: Tensor,
    kind: str,
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    protect_frame: bool,
    shape: list[int],
) -> Tensor:
    """`token_order` as an operator, int32 [1, P] on the device of `like`, for grids that are known when it runs."""
    order = token_order(
        kind,  # pyright: ignore[reportArgumentType]
        frames,
        height,
        width,
        first=first,
        text=text,
        protect_frame=protect_frame,
        shape=tuple(shape),
        device=like.device,
    )
    return order[None].clone()


@token_order_op.register_fake
def _fake(
    like: Tensor,
    kind: str,
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    protect_frame: bool,
    shape: list[int],
) -> Tensor:
    sizes = [frames - 1 if protect_frame else frames, height, width]
    if kind == "tile":
        sizes = [(size + part - 1) // part * part for size, part in zip(sizes, shape, strict=True)]
    protected = height * width if protect_frame else 0
    return like.new_empty((1, sizes[0] * sizes[1] * sizes[2] + protected + text), dtype=torch.int32)


register(
    torch.ops.graphwright.token_order.default, token_order, Contract("token_order", {"like": Argument("...", FLOATS)})
)
