"""How much of an attention map lies near its diagonal, for several widths at once: what RainFusion asks of each head.

    P[b, h]         = softmax(query[b, h] key[b, h]^T * scale)                        [L, L], scale 1 / sqrt(D) if unset
    recall[b, h, w] = 1 / L * sum_i sum_{j: |i - j| <= widths[w]} P[b, h, i, j]

Shapes: query and key ``[B, H, L, D]``, widths ``[W]``, recall ``[B, H, W]``.
Dtypes: query and key float32, float16 or bfloat16; widths int32; recall float32.
A width of L - 1 or more gives 1, a negative one 0. A NaN in a query or a key gives NaN in that head alone.

The map is never stored: the CPU kernel holds some of its rows, the Triton kernel one tile. Widths stay on their device.
Error: the scores are sums of D products in float32, and a relative change of exp(score) by e changes a recall by at
most e / 2; the rest are float32 sums of at most L shares that add up to 1.

Source: the recall of the Adaptive Recognition Module of RainFusion (arXiv:2505.21036): the tokens are those
of one frame (is the head local in the frame?) or every (T - 1)-th token (is it local in time?). The sum over all
queries is the one that its public code takes.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register

HAS_TRITON = find_spec("triton") is not None
if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    _jit: Callable[..., Any] = triton.jit
else:  # no wheel for this platform: the reference and the cpu kernel need none, _cuda says so

    def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


CONTRACT = Contract(
    "band_recall",
    {
        "query": Argument("B H L D", FLOATS),
        "key": Argument("B H L D", FLOATS),
        "widths": Argument("W", (torch.int32,)),
    },
    # 64 queries and 2 x 64 keys of 256 16-bit channels are what fits the 99 KiB of shared memory of sm_86 and sm_89.
    sizes={"L": Size(minimum=1), "D": Size(minimum=1, maximum=256)},
    capability=(8, 0),
)
_LOG2_E = math.log2(math.e)


def recall_flops(length: int, head_dim: int, widths: int = 1) -> int:
    """Floating-point operations of one head: the product, four more a score for the softmax, one a width to sum it."""
    return length * length * (2 * head_dim + 4 + widths)


def reference(query: Tensor, key: Tensor, widths: Tensor, *, scale: float | None = None) -> Tensor:
    """The formula in float32 operators; it stores the maps of all heads."""
    places = torch.arange(query.shape[2], device=query.device)
    band = (places[:, None] - places).abs() <= widths[:, None, None]
    scores = query.float() @ key.float().mT * _scale(query, scale)
    return torch.einsum("bhij,wij->bhw", scores.softmax(-1), band.float()) / query.shape[2]


@torch.library.custom_op("graphwright::band_recall", mutates_args=())
def band_recall(query: Tensor, key: Tensor, widths: Tensor, *, scale: float | None = None) -> Tensor:
    """Share of attention within each width of the diagonal: query and key ``[B, H, L, D]`` to float32 ``[B, H, W]``.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, L, D]``.
        widths: int32 ``[W]``, largest distances between a query and a key.
        scale: Factor of the scores, ``1 / sqrt(D)`` if unset.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


@band_recall.register_fake
def _fake(query: Tensor, key: Tensor, widths: Tensor, *, scale: float | None = None) -> Tensor:
    _require(query, key, widths, proved=False)
    return query.new_empty((*query.shape[:2], widths.shape[0]), dtype=torch.float32)


_SLAB = 1 << 20
"""Scores that the CPU kernel holds at once: 4 MiB in float32."""


def _cpu(query: Tensor, key: Tensor, widths: Tensor, *, scale: float | None = None) -> Tensor:
    """Some rows of the map at a time, of several heads where the maps are small."""
    _require(query, key, widths)
    batch, heads, length, _ = query.shape
    queries, keys = query.flatten(0, 1), key.flatten(0, 1)
    recall = query.new_zeros((batch * heads, len(widths)), dtype=torch.float32)
    rows = min(length, max(1, _SLAB // length))
    together = max(1, _SLAB // (rows * length))
    places = torch.arange(length, dtype=torch.int32)
    limits = widths.tolist()
    for total, q, k in zip(recall.split(together), queries.split(together), keys.split(together), strict=True):
        columns = k.float().mT
        for start in range(0, length, rows):
            part = q[:, start : start + rows].float() * _scale(query, scale)
            shares = (part @ columns).softmax(-1)
            distance = (places[start : start + rows, None] - places).abs_()
            for index, limit in enumerate(limits):
                near = slice(max(0, start - limit), max(0, start + rows + limit))
                inside = shares[..., near].masked_fill(distance[:, near] > limit, 0)
                total[:, index] += inside.sum((-1, -2))
    return recall.div_(length).view(batch, heads, len(widths))


def _cuda(query: Tensor, key: Tensor, widths: Tensor, *, scale: float | None = None) -> Tensor:
    with CONTRACT.on_cuda(query.device):
        _require(query, key, widths)
        return launch(query, key, widths, scale=scale)


def _require(query: Tensor, key: Tensor, widths: Tensor, *, proved: bool = True) -> None:
    CONTRACT.require(query=query, key=key, widths=widths, proved=proved)
    if query.dtype != key.dtype:
        raise InvalidArgument(f"{CONTRACT.operator}: got key of {key.dtype}, expected {query.dtype} as query has")


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch: queries, keys, and how many channels are multiplied at once."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def choose_config(head_dim: int, item_size: int) -> Config:
    """Tiles for ``head_dim`` channels of ``item_size`` bytes, which fit sm_86 and sm_89, the least from 8.0 on.

    float32 takes channels in steps: its three products hold so many registers that a whole row of 64 would spill.
    On an H100, 24 heads of 3840 bfloat16 tokens and 3 widths take 0.53 ms with 64 channels and 0.61 with 128; of 7
    other tiles the best took 0.46 and 0.57. scaled_dot_product_attention of these tokens takes 0.24 and 0.33.
    """
    channels = 1 << (max(head_dim, 16) - 1).bit_length()
    if item_size > 2:
        return Config(64, 32, min(channels, 32), 4, 2)
    return Config(64, 64, channels, 4, 2 if channels > 128 else 3)


def launch(query: Tensor, key: Tensor, widths: Tensor, *, scale: float | None = None) -> Tensor:
    """Run the Triton kernel, arguments unchecked, on query's device (the CPU under TRITON_INTERPRET=1)."""
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    batch, heads, length, head_dim = query.shape
    config = choose_config(head_dim, query.element_size())
    blocks = -(-length // config.block_m)
    sums = query.new_empty((batch, heads, blocks, len(widths)), dtype=torch.float32)
    if sums.numel() > 0:
        _band_kernel[(blocks, batch * heads)](
            query, key, widths.contiguous(), sums, _scale(query, scale) * _LOG2_E, heads, length,
            *query.stride()[:3], *key.stride()[:3], head_dim, len(widths),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
            BLOCK_W=triton.next_power_of_2(len(widths)),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return sums.sum(2).div_(length)


@_jit
def score_tile(q, query_at, key_at, row_holds, column_holds, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The products of a tile of queries and one of keys, whose rows start at these addresses; ``q`` if BLOCK_D >= D.

    float32 is multiplied in three products of tf32, since one would put scores off by 1e-3.
    """
    ds = tl.arange(0, BLOCK_D)
    if BLOCK_D >= D:
        k = tl.load(key_at[None, :] + ds[:, None], mask=column_holds[None, :] & (ds < D)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="tf32x3")
    else:
        scores = tl.zeros([query_at.shape[0], key_at.shape[0]], tl.float32)
        for d in range(0, D, BLOCK_D):
            part = load_rows(query_at + d, row_holds, D - d, BLOCK_D)
            holds = column_holds[None, :] & (d + ds < D)[:, None]
            k = tl.load(key_at[None, :] + (d + ds)[:, None], mask=holds, other=0.0)
            scores = tl.dot(part, k, scores, input_precision="tf32x3")
    return scores


@_jit
def load_rows(at, row_holds, D, BLOCK_D: tl.constexpr):
    """A tile of rows that start at these addresses: their first BLOCK_D of D channels, with zeros where none holds."""
    ds = tl.arange(0, BLOCK_D)
    return tl.load(at[:, None] + ds[None, :], mask=row_holds[:, None] & (ds < D)[None, :], other=0.0)


@_jit
def _band_kernel(
    query, key, widths, sums, scale, H, L,
    query_b, query_h, query_l, key_b, key_h, key_l, D: tl.constexpr, W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head a program: an online softmax whose numerators of all widths are kept along."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_at = query + head // H * query_b + head % H * query_h + rows.to(tl.int64) * query_l
    key += head // H * key_b + head % H * key_h
    q = load_rows(query_at, rows < L, D, BLOCK_D)
    ws = tl.arange(0, BLOCK_W)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    inside = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    for start in range(0, L, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = score_tile(q, query_at, key + columns.to(tl.int64) * key_l, rows < L, columns < L, D, BLOCK_D)
        scores = tl.where((columns < L)[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        sums_of_rows = tl.sum(shares, 1)
        total = total * shrink + sums_of_rows
        inside *= shrink[:, None]
        # Only tiles that the band's edge cuts are looked at token by token.
        ahead, behind = start - block * BLOCK_M, block * BLOCK_M - start
        nearest = tl.maximum(tl.maximum(ahead - BLOCK_M + 1, behind - BLOCK_N + 1), 0)
        farthest = tl.maximum(ahead + BLOCK_N, behind + BLOCK_M) - 1
        for w in tl.static_range(W):
            width = tl.load(widths + w)
            if nearest <= width:
                near = sums_of_rows
                if farthest > width:
                    distance = tl.abs(rows[:, None] - columns[None, :])
                    near = tl.sum(tl.where(distance <= width, shares, 0.0), 1)
                inside += tl.where((ws == w)[None, :], near[:, None], 0.0)
        peak = higher
    recall = tl.where((rows < L)[:, None], inside / total[:, None], 0.0)
    place = head * tl.num_programs(0) + block
    tl.store(sums + place * W + ws, tl.sum(recall, 0), mask=ws < W)


torch.library.impl("graphwright::band_recall", "cpu", _cpu)
torch.library.impl("graphwright::band_recall", "cuda", _cuda)
register(torch.ops.graphwright.band_recall.default, reference, CONTRACT)
