"""`block_sparse_attention` against dense attention and FlexAttention, on the CPU and on a GPU: functions that measure.

    against_dense("cpu", "random", tokens=8192, heads=4, head_dim=64, block_size=128, density=0.25)

gives least seconds by name. Each head has lists of its own: random key blocks, a band around the diagonal, or a window
of 3D tiles, whose lists are runs of blocks with gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphwright.benchmarks.timing import interleaved
from graphwright.kernels.block_lists import density as density_of
from graphwright.kernels.block_lists import lists_of
from graphwright.kernels.block_sparse_attention import block_sparse_attention


def kept_blocks(kind: str, heads: int, blocks: int, density: float, seed: int = 0) -> Tensor:
    """Which key block each query block keeps, bool ``[H, Q, Q]``: "random" with equal counts, "band" or "tile"."""
    places = torch.arange(blocks)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = (
            torch.rand(heads, blocks, blocks, generator=generator).topk(max(1, round(density * blocks)), -1).indices
        )
        return torch.zeros(heads, blocks, blocks, dtype=torch.bool).scatter_(-1, chosen, True)
    if kind == "band":
        # A half-width of w blocks keeps 1 - (1 - w / blocks)^2 of the map; heads get bands around it.
        width = blocks * (1 - (1 - density) ** 0.5)
        widths = (torch.linspace(0.8, 1.2, heads) * width).round()
        return (places[:, None] - places).abs() <= widths[:, None, None]
    # Tiles [T, H, W] in raster order, a window around each that is wider in time for later heads.
    frames = next(t for t in (8, 5, 4, 3, 2, 1) if blocks % t == 0)
    rows = next(h for h in range(int((blocks // frames) ** 0.5), 0, -1) if blocks // frames % h == 0)
    sizes = (frames, rows, blocks // frames // rows)
    at = torch.stack(torch.unravel_index(places, sizes), -1)
    distance = (at[:, None] - at).abs() / torch.tensor(sizes)
    weights = torch.stack([torch.tensor([0.6 + 0.8 * h / max(heads - 1, 1), 1.0, 1.0]) for h in range(heads)])
    # The sum breaks ties, of which there would be many.
    reach = (distance * weights[:, None, None]).amax(-1) + 1e-3 * distance.sum(-1)
    kept = max(1, round(density * blocks * blocks))
    limit = reach.flatten(1).kthvalue(kept, -1).values
    return reach <= limit[:, None, None]


def against_dense(
    device: str,
    kind: str,
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    block_size: int,
    density: float,
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
    flex: bool = False,
    tail: int = 0,
) -> dict[str, Any]:
    """Least seconds of the operator, of dense attention and, if asked for, of FlexAttention on the same lists.

    Args:
        device: "cpu" or "cuda".
        kind: As in `kept_blocks`.
        tokens: N, without the tail.
        heads: H.
        head_dim: D.
        block_size: 64 or 128.
        density: Share of the listed map that is kept.
        dtype: Of queries, keys and values.
        rounds: Rounds of each in turn.
        flex: Compile FlexAttention, too.
        tail: Tokens behind the listed blocks, which are dense.

    Returns:
        "seconds" by name, the "density" of the whole map, and each "speedup" over the fastest dense attention.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, heads, tokens + tail, head_dim)
    query, key, value = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    blocks = tokens // block_size
    keep = kept_blocks(kind, heads, blocks, density).to(device)
    counts, listed = lists_of(keep)
    candidates: dict[str, Callable[[], Any]] = dict(_dense(query, key, value))
    candidates["block_sparse_attention"] = lambda: block_sparse_attention(
        query, key, value, counts, listed, key_blocks=blocks, block_size=block_size
    )
    if flex:
        candidates["FlexAttention"] = flex_attention(query, key, value, keep, block_size)
    if device == "cuda":
        candidates = {name: _synchronized(run) for name, run in candidates.items()}
    with torch.no_grad():
        seconds = interleaved(candidates, rounds, warmup=2)
    dense = min(time for name, time in seconds.items() if name.startswith("dense"))
    return {
        "seconds": seconds,
        "density": density_of(counts, blocks, tokens + tail, tokens + tail, block_size),
        "speedup": {name: dense / time for name, time in seconds.items()},
    }


def flex_attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, block_size: int) -> Callable[[], Tensor]:
    """Compiled FlexAttention over whole blocks; what is behind the kept map is dense."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    missing = -(-query.shape[2] // block_size) - keep.shape[1]
    if missing:
        keep = F.pad(keep, (0, missing, 0, missing), value=True)
    counts, blocks = (t[None] for t in lists_of(keep))
    lengths = (query.shape[2], key.shape[2])
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(blocks), counts, blocks, BLOCK_SIZE=block_size, seq_lengths=lengths
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask)


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Mapping[str, Callable[[], Tensor]]:
    if query.device.type == "cpu":
        return {"dense": lambda: F.scaled_dot_product_attention(query, key, value)}

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return {
        "dense, flash": lambda: run(SDPBackend.FLASH_ATTENTION),
        "dense, cuDNN": lambda: run(SDPBackend.CUDNN_ATTENTION),
    }


def _synchronized(run: Callable[[], Any]) -> Callable[[], None]:
    def measured() -> None:
        run()
        torch.cuda.synchronize()

    return measured
