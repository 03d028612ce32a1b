"""How much attention falls on each relative offset of 3D tiles: the table that the search of Compact Attention reads.

    P[b, h]                 = softmax(query[b, h] key[b, h]^T * scale)         over all keys, scale 1 / sqrt(D) if unset
    mass[b, h, dt, dh, dw]  = mean over queries i of   sum of P[b, h, i, j] over the keys j in tiles at that offset
    rest[b, h]              = mean over queries i of   sum of P[b, h, i, j] over the keys j in no tile

A video of ``frames x height x width`` tokens is cut into tiles of ``tile`` tokens, the last of each axis partial, in a
grid of ``Tt x Th x Tw``. The offset of two tiles is the absolute difference of their coordinates. The queries are those
of tiles 0, stride, 2 * stride, ...; the mean is over their tokens, so ``mass.sum() + rest`` is 1 for each head.

``order`` says which token stands where: position ``p`` is token ``p % volume`` of tile ``p // volume`` (tiles in raster
order, tokens in raster order inside a tile, width fastest), and positions past the last tile are protected tokens
(text), keys that are in no tile. An entry of -1, or any that is no token, is padding: neither a query nor a key.

Shapes: query and key ``[B, H, N, D]`` in the model's order of tokens; order ``[P]``, at least one position for each
place of each tile; mass ``[B, H, Tt, Th, Tw]``, rest ``[B, H]``.
Dtypes: query and key float32, float16 or bfloat16; order int32; mass and rest float32.
The CPU kernel holds the scores of one tile of queries, the Triton kernel those of one pair of tiles; memory grows with
N. A NaN in a query or a key gives NaN in that head alone.

Source: Compact Attention (arXiv:2508.12969): recall and cost of every mask of its family are sums over
this table, since the masks depend on the offset alone.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .band_recall import Config, load_rows, score_tile
from .band_recall import choose_config as band_config
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .token_order import token_order

HAS_TRITON = find_spec("triton") is not None
if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    # Launches differ in where they begin, and one compiled kernel serves them all.
    _jit: Callable[..., Any] = triton.jit(do_not_specialize=["begin"])
else:  # no wheel for this platform: the reference and the cpu kernel need none, _cuda says so

    def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


_COUNT = Size(minimum=1)
CONTRACT = Contract(
    "tile_mass",
    {
        "query": Argument("B H N D", FLOATS),
        "key": Argument("B H N D", FLOATS),
        "order": Argument("P", (torch.int32,)),
    },
    sizes={
        "N": _COUNT,
        "D": Size(minimum=1, maximum=256),  # as band_recall, whose tiles these are
        **dict.fromkeys(("frames", "height", "width", "stride"), _COUNT),
        "protected positions": Size(minimum=0),
    },
    capability=(8, 0),
)
_LOG2_E = math.log2(math.e)


def tile_grid(frames: int, height: int, width: int, tile: Sequence[int]) -> tuple[int, int, int]:
    """How many tiles there are along each axis, partial ones counted."""
    t, h, w = (-(-size // edge) for size, edge in zip((frames, height, width), tile, strict=True))
    return t, h, w


def tile_order(frames: int, height: int, width: int, tile: Sequence[int], protected: int = 0, first: int = 0) -> Tensor:
    """The token at each position, int32 ``[P]``: tile after tile with -1 for padding, then the protected tokens.

    Args:
        frames: Latent frames of the video, whose tokens follow each other in raster order, width fastest.
        height: Rows of tokens.
        width: Tokens in a row.
        tile: Tokens of a tile along each axis.
        protected: How many tokens the model has beside the video's; they keep their order.
        first: Where the model has the video's first token: 0 with text behind the video, ``protected`` before it.

    Raises:
        InvalidArgument: A size is not positive, or ``first`` is not in [0, protected].
    """
    return token_order("tile", frames, height, width, first=first, text=protected, shape=tuple(tile))


def tile_counts(frames: int, height: int, width: int, tile: Sequence[int], stride: int = 1) -> Tensor:
    """How many pairs of a query tile and a key tile are at each offset, float64 ``[Tt, Th, Tw]``, for this stride."""
    grid = tile_grid(frames, height, width, tile)
    sampled = torch.unravel_index(torch.arange(0, math.prod(grid), stride), grid)
    near = []
    for size, at in zip(grid, sampled, strict=True):
        distances = (torch.arange(size) - at[:, None]).abs()
        near.append(torch.nn.functional.one_hot(distances, size).sum(1).double())
    return torch.einsum("pt,ph,pw->thw", *near)


def reference(
    query: Tensor, key: Tensor, order: Tensor, *,
    frames: int, height: int, width: int, tile: Sequence[int], stride: int = 1, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in float32 operators; it stores the maps of all heads, and the offset of every pair of tiles."""
    grid = tile_grid(frames, height, width, tile)
    volume, tiles = math.prod(tile), math.prod(grid)
    held = (order >= 0) & (order < query.shape[2])
    tokens = order.long() * held
    scores = query[:, :, tokens].float() @ key[:, :, tokens].float().mT * _scale(query, scale)
    shares = scores.masked_fill(~held, float("-inf")).softmax(-1)
    sampled = torch.arange(tiles * volume, device=order.device) // volume % stride == 0
    rows = (sampled & held[: tiles * volume]).nonzero().flatten()
    mean = shares[:, :, rows, : tiles * volume].unflatten(-1, (tiles, volume)).sum(-1) / max(len(rows), 1)
    bins = offset_bins(grid, rows // volume)
    mass = query.new_zeros((*query.shape[:2], tiles), dtype=torch.float32)
    mass.index_add_(2, bins.flatten(), mean.flatten(2))
    return mass.unflatten(-1, grid), shares[:, :, rows, tiles * volume :].sum((-1, -2)) / max(len(rows), 1)


def offset_bins(grid: Sequence[int], of: Tensor) -> Tensor:
    """Where in a flat table ``[Tt, Th, Tw]`` the offset of tiles ``of`` ``[n]`` to every tile stands, ``[n, Q]``."""
    every = torch.arange(math.prod(grid), device=of.device)
    bins = torch.zeros_like(of[:, None] + every)
    for size, to, at in zip(grid, torch.unravel_index(every, grid), torch.unravel_index(of, grid), strict=True):
        bins = bins * size + (to - at[:, None]).abs()
    return bins


@torch.library.custom_op(
    "graphwright::tile_mass",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor order, *, SymInt frames, SymInt height, SymInt width, int[3] tile, "
    "int stride=1, float? scale=None) -> (Tensor, Tensor)",
)
def tile_mass(
    query: Tensor, key: Tensor, order: Tensor, *,
    frames: int, height: int, width: int, tile: Sequence[int], stride: int = 1, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean attention by offset of tiles, float32 ``[B, H, Tt, Th, Tw]``, and the mean rest, float32 ``[B, H]``.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, H, N, D]``.
        order: int32 ``[P]``, see :func:`tile_order`.
        frames: Latent frames of the video.
        height: Rows of tokens of a frame.
        width: Tokens of a row.
        tile: Tokens of a tile along each axis.
        stride: Every stride-th tile of queries is looked at.
        scale: Factor of the scores, ``1 / sqrt(D)`` if unset.

    Raises:
        InvalidArgument: A dtype, shape or size that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


@tile_mass.register_fake
def _fake(
    query: Tensor, key: Tensor, order: Tensor, *,
    frames: int, height: int, width: int, tile: Sequence[int], stride: int = 1, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grid = _require(query, key, order, frames, height, width, tile, stride, proved=False)
    mass = query.new_empty((*query.shape[:2], *grid), dtype=torch.float32)
    return mass, query.new_empty(query.shape[:2], dtype=torch.float32)


_SLAB = 1 << 21
"""Scores that the CPU kernel holds at once, if one tile of queries has fewer: 8 MiB in float32."""


def _cpu(
    query: Tensor, key: Tensor, order: Tensor, *,
    frames: int, height: int, width: int, tile: Sequence[int], stride: int = 1, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One tile of queries at a time, of several heads where the video is small."""
    grid = _require(query, key, order, frames, height, width, tile, stride)
    volume, tiles = math.prod(tile), math.prod(grid)
    held = (order >= 0) & (order < query.shape[2])
    tokens = order.long() * held
    closed = torch.zeros(len(order)).masked_fill_(~held, float("-inf"))
    queries, keys = query.flatten(0, 1), key.flatten(0, 1)
    table = torch.zeros(len(queries), tiles + 1, dtype=torch.float64)
    together = max(1, _SLAB // (volume * len(order)))
    seen = 0
    for first in range(0, tiles, stride):
        places = slice(first * volume, (first + 1) * volume)
        seen += int(held[places].sum())
    for total, q, k in zip(table.split(together), queries.split(together), keys.split(together), strict=True):
        columns = k[:, tokens].float().mT
        for first in range(0, tiles, stride):
            places = slice(first * volume, (first + 1) * volume)
            rows = q[:, tokens[places][held[places]]].float() * _scale(query, scale)
            by_key = torch.baddbmm(closed, rows, columns).softmax(-1).sum(1)
            by_tile = by_key[:, : tiles * volume].unflatten(-1, (tiles, volume)).sum(-1)
            total.index_add_(1, offset_bins(grid, torch.tensor([first]))[0], by_tile.double())
            total[:, tiles] += by_key[:, tiles * volume :].sum(-1)
    return _split((table / max(seen, 1)).float().unflatten(0, query.shape[:2]), grid)


def _split(table: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Mass and rest of a table ``[B, H, Q + 1]``, each in memory of its own, as an operator's results must be."""
    return table[..., :-1].contiguous().unflatten(-1, grid), table[..., -1].contiguous()


def _cuda(
    query: Tensor, key: Tensor, order: Tensor, *,
    frames: int, height: int, width: int, tile: Sequence[int], stride: int = 1, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with CONTRACT.on_cuda(query.device):
        _require(query, key, order, frames, height, width, tile, stride)
        sizes = {"frames": frames, "height": height, "width": width, "tile": tile}
        return launch(query, key, order, **sizes, stride=stride, scale=scale)


def _require(
    query: Tensor, key: Tensor, order: Tensor,
    frames: int, height: int, width: int, tile: Sequence[int], stride: int, proved: bool = True,
) -> tuple[int, int, int]:  # fmt: skip
    """Check the arguments, and return the grid of tiles."""
    if len(tile) != 3 or min(tile) < 1:
        raise InvalidArgument(f"{CONTRACT.operator}: got tile={list(tile)}, expected three sizes of at least 1")
    grid = tile_grid(frames, height, width, tile)
    sizes = {"frames": frames, "height": height, "width": width, "stride": stride}
    sizes["protected positions"] = order.shape[0] - math.prod(grid) * math.prod(tile) if order.ndim == 1 else 0
    CONTRACT.require(query=query, key=key, order=order, proved=proved, **sizes)
    if query.dtype != key.dtype:
        raise InvalidArgument(f"{CONTRACT.operator}: got key of {key.dtype}, expected {query.dtype} as query has")
    return grid


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def choose_config(head_dim: int, item_size: int, volume: int) -> Config:
    """Blocks of tiles of ``volume`` tokens: band_recall's, in float32 half as many rows, which would spill here.

    On an H100, every 8th tile of 128 tokens of 80640, 12 heads of 64 bfloat16 channels take 18.6 ms.
    """
    config = band_config(head_dim, item_size)
    covers = max(16, 1 << (volume - 1).bit_length())
    rows = config.block_m if item_size <= 2 else 32
    return replace(config, block_m=min(rows, covers), block_n=min(config.block_n, covers))


def launch(
    query: Tensor, key: Tensor, order: Tensor, *,
    frames: int, height: int, width: int, tile: Sequence[int], stride: int = 1, scale: float | None = None,
    programs: int = 4096,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the Triton kernel, arguments unchecked, on query's device (the CPU under TRITON_INTERPRET=1).

    About as many ``programs`` are started at once: 4096 fill any GPU, and their tables stay small.
    """
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    order = order.contiguous()
    batch, heads, count, head_dim = query.shape
    grid = tile_grid(frames, height, width, tile)
    volume, tiles = math.prod(tile), math.prod(grid)
    config = choose_config(head_dim, query.element_size(), volume)
    parts = -(-volume // config.block_m)
    work = -(-tiles // stride) * parts
    programs = min(work, -(-programs // max(batch * heads, 1)))
    # Launches follow each other, and a program adds to a table of its own: two calls give the same bits.
    tables = query.new_zeros((batch, heads, programs, tiles + 1), dtype=torch.float32)
    for begin in range(0, work if tables.numel() > 0 else 0, programs):
        _mass_kernel[(min(programs, work - begin), batch * heads)](
            query, key, order, tables, _scale(query, scale) * _LOG2_E, heads, count, len(order), programs,
            *query.stride()[:3], *key.stride()[:3], tiles, *grid[1:], volume, stride, begin, head_dim,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    queries = order[: tiles * volume].view(tiles, volume)[::stride]
    seen = ((queries >= 0) & (queries < count)).sum().clamp_min(1)
    return _split(tables.sum(2) / seen, grid)


@_jit
def _mass_kernel(
    query, key, order, tables, scale, H, N, P, programs, query_b, query_h, query_n, key_b, key_h, key_n,
    tiles, tiles_h, tiles_w, volume, stride, begin, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A part of a tile of queries of one head a program: their log-sum-exp over all keys, then each tile's share."""
    head = tl.program_id(1).to(tl.int64)
    query += head // H * query_b + head % H * query_h
    key += head // H * key_b + head % H * key_h
    tables += (head * programs + tl.program_id(0)) * (tiles + 1)
    parts = tl.cdiv(volume, BLOCK_M)
    key_parts = tl.cdiv(volume, BLOCK_N)
    ms = tl.arange(0, BLOCK_M)
    ns = tl.arange(0, BLOCK_N)
    item = begin + tl.program_id(0)
    tile = item // parts * stride
    inside = item % parts * BLOCK_M + ms
    from_token = tl.load(order + tile * volume + inside, mask=inside < volume, other=-1)
    rows = (from_token >= 0) & (from_token < N)
    query_at = query + from_token.to(tl.int64) * query_n
    q = load_rows(query_at, rows, D, BLOCK_D)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, P, BLOCK_N):
        token = tl.load(order + start + ns, mask=start + ns < P, other=-1)
        columns = (token >= 0) & (token < N)
        scores = score_tile(q, query_at, key + token.to(tl.int64) * key_n, rows, columns, D, BLOCK_D)
        scores = tl.where(columns[None, :], scores * scale, float("-inf"))
        # Finite even if all keys so far are padding: the difference of two infinities is no number.
        higher = tl.maximum(tl.maximum(peak, tl.max(scores, 1)), -1e30)
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        peak = higher
    level = peak + tl.log2(total)
    for piece in range(tiles * key_parts):
        other = piece // key_parts
        within = piece % key_parts * BLOCK_N + ns
        token = tl.load(order + other * volume + within, mask=within < volume, other=-1)
        columns = (token >= 0) & (token < N)
        scores = score_tile(q, query_at, key + token.to(tl.int64) * key_n, rows, columns, D, BLOCK_D)
        shares = tl.where(rows[:, None] & columns[None, :], tl.exp2(scores * scale - level[:, None]), 0.0)
        dt = tl.abs(other // (tiles_h * tiles_w) - tile // (tiles_h * tiles_w))
        dh = tl.abs(other // tiles_w % tiles_h - tile // tiles_w % tiles_h)
        dw = tl.abs(other % tiles_w - tile % tiles_w)
        tl.atomic_add(tables + (dt * tiles_h + dh) * tiles_w + dw, tl.sum(shares), sem="relaxed")
    for start in range(tiles * volume, P, BLOCK_N):
        token = tl.load(order + start + ns, mask=start + ns < P, other=-1)
        columns = (token >= 0) & (token < N)
        scores = score_tile(q, query_at, key + token.to(tl.int64) * key_n, rows, columns, D, BLOCK_D)
        shares = tl.where(rows[:, None] & columns[None, :], tl.exp2(scores * scale - level[:, None]), 0.0)
        tl.atomic_add(tables + tiles, tl.sum(shares), sem="relaxed")


torch.library.impl("graphwright::tile_mass", "cpu", _cpu)
torch.library.impl("graphwright::tile_mass", "cuda", _cuda)
register(torch.ops.graphwright.tile_mass.default, reference, CONTRACT)  # pyright: ignore[reportArgumentType] (two results)
