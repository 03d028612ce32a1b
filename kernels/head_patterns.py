"""RainFusion's head patterns: for each kind of head an order of the tokens and the key blocks that a query keeps in it.

    temporal   order (h, w, t), band |i - j| <= w           local in the frame, the same place in all frames
    spatial    order (t, h, w), band |i - j| <= w           whole frames, near in time
    textural   tokens with i mod tau = j mod tau first      every query, those keys only

The first frame and text are protected: they stand last and are dense as rows and as columns. With Lr tokens in the
other frames, w is ``floor(bandwidth * Lr / block)`` blocks; blocks that the band's edge cuts are kept whole. A band of
half-width ``bandwidth * Lr`` leaves ``(1 - bandwidth)^2`` of the pairs out, so sparsity s asks for a bandwidth of
``1 - sqrt(s)``, and the textural heads for ``tau = 1 / (1 - s)``, rounded, at least 2.

Rows of the result: temporal with each bandwidth, spatial with each bandwidth, textural: R = 2 * bandwidths + 1.
Which row a head takes is decided when the program runs (`passes/route_heads.py`); heads of one kind share its lists.

Source: RainFusion, arXiv 2505.21036, and the public code of its authors. The paper's code rounds bands to 128 tokens,
its kernel's block; here it is the operator's block.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .block_lists import lists_of
from .contract import FLOATS, Argument, Contract, Size, register
from .token_order import token_order


def bandwidth_of(sparsity: float) -> float:
    """The half-width of a band, as a share of the tokens, that leaves `sparsity` of the pairs out; two decimals."""
    return round(1 - math.sqrt(sparsity), 2)


def tau_of(sparsity: float) -> int:
    """The modulus of textural heads that keep about `1 - sparsity` of the keys."""
    return max(2, round(1 / (1 - sparsity)))


def row_names(bandwidths: int) -> tuple[str, ...]:
    """What each row of the lists is, for `bandwidths` bandwidths."""
    bands = [f" {number}" if bandwidths > 1 else "" for number in range(1, bandwidths + 1)]
    return (*(f"temporal{band}" for band in bands), *(f"spatial{band}" for band in bands), "textural")


def head_patterns(
    frames: int,
    height: int,
    width: int,
    *,
    first: int,
    text: int,
    block_size: int,
    bandwidths: tuple[float, ...],
    tau: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Orders and block lists of all rows.

    Args:
        frames: Frames of the grid, at least 2.
        height: Tokens of a frame, vertically.
        width: Tokens of a frame, horizontally.
        first: Index of the first video token in the model's sequence.
        text: Number of tokens that are no video.
        block_size: Tokens of a block.
        bandwidths: Half-widths of bands as shares of the tokens, in [0, 1].
        tau: Modulus of textural heads.
        device: Where the tensors are wanted.

    Returns:
        Orders int32 [R, P], counts int32 [R, Q] and blocks int32 [R, Q, Q] for `block_sparse_attention`, with Q whole
        blocks in the frames after the first; what is left over is dense.

    Raises:
        InvalidArgument: There is one frame only, or less than one block after it.
    """
    return _cached(frames, height, width, first, text, block_size, tuple(bandwidths), tau, str(device))


@lru_cache(maxsize=16)
def _cached(
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    block_size: int,
    bandwidths: tuple[float, ...],
    tau: int,
    device: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = (frames - 1) * height * width
    size = tokens // block_size
    if size < 1:
        raise InvalidArgument(
            f"got {frames} frames of {height} x {width} tokens, no block of {block_size} after the first"
        )
    place = {"first": first, "text": text, "protect_frame": True, "device": device}
    temporal = token_order("frame_last", frames, height, width, **place)
    spatial = token_order("raster", frames, height, width, **place)
    textural = token_order("checkerboard", frames, height, width, shape=(tau,), **place)
    positions = torch.arange(size, device=device)
    distance = (positions[:, None] - positions[None, :]).abs()
    bands = [distance <= math.floor(bandwidth * tokens / block_size) for bandwidth in bandwidths]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    chosen = (frames - 1) * int(((rows - columns) % tau == 0).sum())
    sampled = (positions * block_size < chosen).expand(size, size)
    orders = torch.stack([*[temporal] * len(bands), *[spatial] * len(bands), textural])
    counts, blocks = lists_of(torch.stack([*bands, *bands, sampled]))
    return orders, counts, blocks


@torch.library.custom_op("graphwright::head_patterns", mutates_args=())
def head_patterns_op(
    like: Tensor,
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    block_size: int,
    bandwidths: list[float],
    tau: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_patterns` as an operator, on the device of `like`, for grids that are known when it runs."""
    made = head_patterns(
        frames,
        height,
        width,
        first=first,
        text=text,
        block_size=block_size,
        bandwidths=tuple(bandwidths),
        tau=tau,
        device=like.device,
    )
    orders, counts, blocks = (tensor.clone() for tensor in made)
    return orders, counts, blocks


@head_patterns_op.register_fake
def _fake(
    like: Tensor,
    frames: int,
    height: int,
    width: int,
    first: int,
    text: int,
    block_size: int,
    bandwidths: list[float],
    tau: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = 2 * len(bandwidths) + 1, (frames - 1) * height * width // block_size
    return (
        like.new_empty((rows, frames * height * width + text), dtype=torch.int32),
        like.new_empty((rows, size), dtype=torch.int32),
        like.new_empty((rows, size, size), dtype=torch.int32),
    )


register(
    torch.ops.graphwright.head_patterns.default,
    head_patterns,
    Contract("head_patterns", {"like": Argument("...", FLOATS)}, sizes={"block_size": Size(one_of=(64, 128))}),
)
