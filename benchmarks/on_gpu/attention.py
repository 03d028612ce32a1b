"""Attention of video models: block lists, what finds them, and reuse, in bfloat16 with heads of 128 channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphwright.benchmarks.block_sparse import flex_attention, kept_blocks
from graphwright.benchmarks.on_gpu.measure import Case, Goal, Run, relative_error
from graphwright.kernels.attention_lse import attention_lse
from graphwright.kernels.band_recall import band_recall
from graphwright.kernels.block_lists import density as density_of
from graphwright.kernels.block_lists import keep_of, lists_of
from graphwright.kernels.block_sparse_attention import block_sparse_attention
from graphwright.kernels.collapsed_attention import collapsed_attention
from graphwright.kernels.tile_mass import tile_mass, tile_order

HEADS, HEAD_DIM, BLOCK = 24, 128, 128
GRIDS = {32760: (21, 30, 52), 80640: (21, 48, 80)}
"""Tokens of 81 frames in 480 x 832 and 768 x 1280 pixels -> frames, height, width of Wan 2.1's latent grid."""
DENSITIES = (0.2, 0.35, 0.5, 1.0)
CHECKED_ROWS = 64


def block_sparse() -> Iterator[Case]:
    """Random lists of equal length for each head against dense attention and FlexAttention."""
    for tokens in GRIDS:
        tensors = _qkv(tokens)
        for density in DENSITIES:
            yield _sparse_case(*tensors, density)


def _sparse_case(query: Tensor, key: Tensor, value: Tensor, density: float) -> Case:
    tokens = query.shape[2]
    blocks = tokens // BLOCK
    keep = kept_blocks("random", HEADS, blocks, density).cuda()
    counts, listed = lists_of(keep)
    real = density_of(counts, blocks, tokens, tokens, BLOCK)
    lists = {"key_blocks": blocks, "block_size": BLOCK}
    # Compiled functions of the last case are not kept.
    torch.compiler.reset()
    flex = flex_attention(query, key, value, keep, BLOCK)
    return Case(
        "block_sparse_attention",
        f"{tokens} tokens, density {real:.2f}",
        {
            "block_sparse_attention": lambda _: block_sparse_attention(query, key, value, counts, listed, **lists),
            **dense_attention(query, key, value),
            "FlexAttention": lambda _: flex(),
        },
        check=lambda y: _sparse_error(y, query, key, value, counts, listed, blocks),
        moved=4 * query.numel() * 2,
        operations=round(4 * real * tokens * tokens * HEAD_DIM * HEADS),
        goals=(Goal("dense", 0.75 / real), Goal("FlexAttention", 1.0)),
    )


def recognition() -> Iterator[Case]:
    """RainFusion's ARM and Compact Attention's histogram as shares of dense attention."""
    for tokens, grid in GRIDS.items():
        tensors = _qkv(tokens)
        yield _arm_case(*tensors, *grid)
        for stride in (1, 8, 64):
            yield _mass_case(*tensors, *grid, stride)


def _arm_case(query: Tensor, key: Tensor, value: Tensor, frames: int, height: int, width: int) -> Case:
    frame = height * width
    widths = torch.tensor([frame // 4], dtype=torch.int32, device="cuda")
    in_frame = [t[:, :, frame : 2 * frame] for t in (query, key)]
    in_time = [t[:, :, frame :: frames - 1][:, :, :frame] for t in (query, key)]
    return Case(
        "band_recall (RainFusion's ARM)",
        f"{query.shape[2]} tokens: two samples of {frame}",
        {
            "ARM": lambda _: (band_recall(*in_frame, widths), band_recall(*in_time, widths)),
            **dense_attention(query, key, value),
        },
        operations=2 * 2 * frame * frame * HEAD_DIM * HEADS,
        goals=(Goal("dense", 200.0),),
    )


def _mass_case(query: Tensor, key: Tensor, value: Tensor, frames: int, height: int, width: int, stride: int) -> Case:
    tokens, tile = query.shape[2], (2, 8, 8)
    order = tile_order(frames, height, width, tile).cuda()
    sizes = {"frames": frames, "height": height, "width": width, "tile": tile, "stride": stride}
    return Case(
        "tile_mass (Compact Attention)",
        f"{tokens} tokens, every {stride}th tile of queries" if stride > 1 else f"{tokens} tokens, all queries",
        {"tile_mass": lambda _: tile_mass(query, key, order, **sizes)[0], **dense_attention(query, key, value)},
        # Scores are needed twice: for the sum of a row, and to be divided by it.
        operations=round(2 * 2 * tokens * tokens / stride * HEAD_DIM * HEADS),
        goals=(Goal("dense", 200.0),) if stride == 64 else (),
    )


def reuse() -> Iterator[Case]:
    """TimeRipple's collapsed attention, and ASTRAEA's selection with the attention of selected queries."""
    tensors = _qkv(32760)
    for saving in (0.75, 0.85):
        yield _collapsed_case(*tensors, saving)
    for budget in (0.5, 0.3):
        yield _selection_case(*tensors, budget)


def _collapsed_case(query: Tensor, key: Tensor, value: Tensor, saving: float) -> Case:
    tokens = query.shape[2]
    roots = [_roots(tokens, 1 - math.sqrt(1 - saving), seed).cuda() for seed in (0, 1)]
    place = torch.arange(tokens, device="cuda", dtype=torch.int32)
    left = [float((root == place).float().mean()) for root in roots]
    return Case(
        "collapsed_attention (TimeRipple)",
        f"{tokens} tokens, {1 - left[0] * left[1]:.0%} of the scores saved",
        {
            "collapsed_attention": lambda _: collapsed_attention(query, key, value, *roots),
            **dense_attention(query, key, value),
        },
        check=lambda y: _collapsed_error(y, query, key, value, *roots),
        operations=round(4 * left[0] * left[1] * tokens * tokens * HEAD_DIM * HEADS),
        note="the published 2.1x assume that saved scores are saved time",
    )


def _selection_case(query: Tensor, key: Tensor, value: Tensor, budget: float) -> Case:
    tokens, hidden = query.shape[2], HEADS * HEAD_DIM
    states, cached = torch.randn(2, 1, tokens, hidden, device="cuda", dtype=torch.bfloat16)
    change = torch.rand(1, tokens, device="cuda")
    count = round(budget * tokens)
    few = query[:, :, :count].contiguous()

    def move(_: int) -> Tensor:
        at = change.topk(count, dim=1, sorted=False).indices[..., None].expand(-1, -1, hidden)
        return cached.scatter(1, at, states.gather(1, at))

    return Case(
        "selection and scatter (ASTRAEA)",
        f"{tokens} tokens of {hidden} channels, budget {budget}",
        {
            "top-k, gather, scatter": move,
            "attention of the selected": lambda _: attention_lse(few, key, value)[0],
            **dense_attention(query, key, value),
        },
        moved=2 * hidden * (tokens + 2 * count) * 2,
        goals=(Goal("dense", 20.0),),
    )


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Mapping[str, Run]:
    """PyTorch's dense attention by backend."""

    def run(backend: SDPBackend) -> Callable[[int], Tensor]:
        def attend(_: int) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return attend

    return {
        "dense, flash": run(SDPBackend.FLASH_ATTENTION),
        "dense, cuDNN": run(SDPBackend.CUDNN_ATTENTION),
    }


def _qkv(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 1, HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return query, key, value


def _roots(tokens: int, share: float, seed: int) -> Tensor:
    """A root for each token, int32 [1, H, N]: a share of tokens, at odd places, follow their left neighbours."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(tokens, dtype=torch.int32).expand(1, HEADS, tokens)
    # Runs of two hold a half; for more than that, runs of four.
    run = 2 if share <= 0.5 else 4
    follows = (place % run > 0) & (torch.rand(1, HEADS, tokens, generator=generator) < share * run / (run - 1))
    return torch.where(follows, place - place % run, place)


def _sparse_error(
    y: Tensor, query: Tensor, key: Tensor, value: Tensor, counts: Tensor, blocks: Tensor, key_blocks: int
) -> float:
    """On some rows of two heads, one of them among the tokens behind the last block."""
    keep = keep_of(counts, blocks, key_blocks)
    rows = torch.linspace(0, query.shape[2] - 1, CHECKED_ROWS, device="cuda").long()
    errors = []
    for head in (0, HEADS - 1):
        mask = torch.ones(CHECKED_ROWS, key.shape[2], dtype=torch.bool, device="cuda")
        listed = rows < key_blocks * BLOCK
        kept = keep[head][(rows[listed] // BLOCK)].repeat_interleave(BLOCK, 1)
        mask[listed, : key_blocks * BLOCK] = kept
        wanted = _exact(query[0, head, rows], key[0, head], value[0, head], mask)
        errors.append(relative_error(y[0, head, rows], wanted))
    return max(errors)


def _collapsed_error(y: Tensor, query: Tensor, key: Tensor, value: Tensor, q_root: Tensor, k_root: Tensor) -> float:
    rows = torch.linspace(0, query.shape[2] - 1, CHECKED_ROWS, device="cuda").long()
    errors = []
    for head in (0, HEADS - 1):
        q = query[0, head][q_root[0, head, rows].long()]
        errors.append(relative_error(y[0, head, rows], _exact(q, key[0, head][k_root[0, head].long()], value[0, head])))
    return max(errors)


def _exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = query.double() @ key.double().T * HEAD_DIM**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value.double()
