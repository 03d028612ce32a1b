"""Let neighbouring video tokens that nearly agree share values: what TimeRipple reuses, as a change of operands.

    Delta_a[n, c]   = standard deviation of x[., c] over the window of n along axis a    (K = 2: |x_0 - x_1| / 2)
    flag_a[n, c]    = Delta_a[n, c] < theta * factor of c's group,    for the tokens of a window but its first
    parent[n, c]    = the first of n's window along t where flagged, else along h, else along w; else n itself
    root[n, c]      = parent of parent of ... n: a token without a flag, at most one step for each axis away
    snapped[n, c]   = x[root[n, c], c]
    reused[c]       = number of tokens with any flag, which are those with root[n, c] != n

Windows are K neighbouring tokens of the grid ``frames x height x width`` along one axis, aligned, so that their first
is always there; what does not fill a window at the end of an axis is never reused. All flags are those of `x` itself. A
root is in the cell of K x K x K tokens around its token, and at most 1 - 1 / K^3 of the values are reused.

Granularity: ``element`` flags each channel by itself, ``group`` by the root of the mean of Delta^2 over the channels of
its group, ``token`` by that over all channels: a token then has one root, which `token_roots` gives.

    x          [B, H, N, D]    float32, float16 or bfloat16; tokens first to first + T * H * W are video in raster order
    theta      float32 [1]     0 leaves everything, infinity makes every cell constant
    snapped    [B, H, N, D]    x's dtype; what is no video is as it was
    reused     int32 [B, H, D]
    roots      int32 [B, H, N]

Products of snapped queries and keys are the products of the tokens that they were snapped to, so attention on snapped
operands is attention that computes the partial score q[i, c] k[j, c] only where neither side is reused: a share of
1 - mean_c (1 - rq_c) (1 - rk_c) of the multiplications is saved, with r_c the share of reused tokens.

Exact but for Delta, which is computed in float32. A NaN is never reused, nor is what is compared with it.

Source: TimeRipple (arXiv 2511.12035): windows, thresholds and the union of axes. That windows are aligned, and which of
several flags is followed, is this implementation's: so every value that is reused is one that is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register

Granularity = Literal["element", "group", "token"]

_SIZES = {
    "D": Size(minimum=1, maximum=256),  # a row of channels is held in registers
    "E": Size(minimum=1, maximum=1),
    "window": Size(minimum=2),
    "first": Size(minimum=0),
    **dict.fromkeys(("frames", "height", "width"), Size(minimum=1)),
}
CONTRACT = Contract(
    "snap_tokens", {"x": Argument("B H N D", FLOATS), "theta": Argument("E", (torch.float32,))}, sizes=_SIZES
)
ROOTS_CONTRACT = Contract(
    "token_roots", {"x": Argument("B H N D", FLOATS), "theta": Argument("E", (torch.float32,))}, sizes=_SIZES
)


def saved_share(query_reused: Tensor, key_reused: Tensor, tokens: int) -> Tensor:
    """Share of the multiplications of a score map that is saved, float64 ``[B, H]``.

    Args:
        query_reused: ``reused`` of the queries, int ``[B, H, D]``.
        key_reused: That of the keys, ``[B, G, D]``; G divides H.
        tokens: N, what is no video included.
    """
    group = query_reused.shape[1] // key_reused.shape[1]
    computed = [1 - r.double() / tokens for r in (query_reused, key_reused.repeat_interleave(group, 1))]
    return 1 - (computed[0] * computed[1]).mean(-1)


def reference(
    x: Tensor, theta: Tensor, groups: Sequence[int], factors: Sequence[float], *,
    frames: int, height: int, width: int, first: int, axes: Sequence[int], window: int, granularity: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula: every element goes back to its root, step by step."""
    sizes = (frames, height, width)
    video, limit = x[:, :, first : first + frames * height * width], _limits(x, theta, groups, factors)
    last = video.shape[2] - 1
    root = torch.arange(last + 1, device=x.device)[:, None].expand(video.shape).clone()
    for _ in range(3):
        parent = root
        for axis in sorted(axes, reverse=True):
            stride, length = math.prod(sizes[axis + 1 :]), sizes[axis]
            at = root // stride % length
            start = root - at % window * stride
            # Of a window that is not whole no token is flagged, so it does not matter which tokens stand in for it.
            members = [(start + k * stride).clamp(max=last) for k in range(window)]
            values = torch.stack([video.gather(2, member).float() for member in members])
            delta = values.var(0, correction=0).sqrt() if window > 2 else (values[1] - values[0]).abs() / 2
            # Channels that share their flags have moved together, so each compares at its own token.
            flagged = _shared(delta, groups, granularity) < limit
            flagged &= (at % window != 0) & (at - at % window + window <= length)
            parent = torch.where(flagged, start, parent)
        root = parent
    snapped = x.clone()
    snapped[:, :, first : first + last + 1] = video.gather(2, root)
    reused = root != torch.arange(last + 1, device=x.device)[:, None]
    return snapped, reused.sum(2, dtype=torch.int32)


def roots_reference(
    x: Tensor, theta: Tensor, *, frames: int, height: int, width: int, first: int, axes: Sequence[int], window: int
) -> Tensor:
    """Roots of whole tokens."""
    roots = torch.arange(x.shape[2], dtype=torch.int32, device=x.device).expand(x.shape[:3]).clone()
    found = _roots(x, theta, [x.shape[3]], [1.0], (frames, height, width), first, axes, window, "token")
    roots[:, :, first : first + found.shape[2]] = found[..., 0] + first
    return roots


def _limits(x: Tensor, theta: Tensor, groups: Sequence[int], factors: Sequence[float]) -> Tensor:
    """The threshold of each channel, float32 ``[D]``."""
    per_group = torch.tensor(factors, device=x.device) * theta.to(x.device)
    return per_group.repeat_interleave(torch.tensor(groups, device=x.device))


def _shared(delta: Tensor, groups: Sequence[int], granularity: str) -> Tensor:
    """Delta ``[..., D]`` as its flags see it: of each channel, or the root mean square of those that share a flag."""
    if granularity == "element":
        return delta
    parts = delta.square().split(list(groups) if granularity == "group" else [delta.shape[-1]], -1)
    return torch.cat([part.mean(-1, keepdim=True).sqrt().expand_as(part) for part in parts], -1)


@torch.library.custom_op("graphwright::snap_tokens", mutates_args=())
def snap_tokens(
    x: Tensor,
    theta: Tensor,
    groups: list[int],
    factors: list[float],
    *,
    frames: int,
    height: int,
    width: int,
    first: int,
    axes: list[int],
    window: int,
    granularity: str,
) -> tuple[Tensor, Tensor]:
    """Snap the tokens of queries or keys.

    Args:
        x: ``[B, H, N, D]``.
        theta: float32 ``[1]``, the threshold; on x's device.
        groups: Channels of each group, D together.
        factors: What the threshold is multiplied with, for each group.
        frames, height, width: The grid in tokens.
        first: Index of the first video token.
        axes: Along which axes tokens may be reused: 0 is t, 1 is h, 2 is w.
        window: Tokens of a window, K.
        granularity: "element", "group" or "token".

    Returns:
        The snapped tokens ``[B, H, N, D]``, and the number of reused ones for each channel, int32 ``[B, H, D]``.

    Raises:
        InvalidArgument: What ``CONTRACT`` does not hold, or a grid, groups or axes that do not fit.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


@torch.library.custom_op("graphwright::token_roots", mutates_args=())
def token_roots(
    x: Tensor, theta: Tensor, *, frames: int, height: int, width: int, first: int, axes: list[int], window: int
) -> Tensor:
    """The token whose place each token takes at granularity "token", int32 ``[B, H, N]``; arguments as above."""
    raise missing_kernel(ROOTS_CONTRACT.operator, x.device)


@snap_tokens.register_fake
def _fake(
    x: Tensor, theta: Tensor, groups: list[int], factors: list[float], *,
    frames: int, height: int, width: int, first: int, axes: list[int], window: int, granularity: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _require(CONTRACT, x, theta, groups, factors, (frames, height, width), first, axes, window, granularity, False)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        (x.shape[0], x.shape[1], x.shape[3]), dtype=torch.int32
    )


@token_roots.register_fake
def _fake_roots(
    x: Tensor, theta: Tensor, *, frames: int, height: int, width: int, first: int, axes: list[int], window: int
) -> Tensor:
    _require(ROOTS_CONTRACT, x, theta, None, None, (frames, height, width), first, axes, window, "token", False)
    return x.new_empty(x.shape[:3], dtype=torch.int32)


def _cpu(
    x: Tensor, theta: Tensor, groups: list[int], factors: list[float], *,
    frames: int, height: int, width: int, first: int, axes: list[int], window: int, granularity: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _require(CONTRACT, x, theta, groups, factors, (frames, height, width), first, axes, window, granularity)
    root = _roots(x, theta, groups, factors, (frames, height, width), first, axes, window, granularity)
    video = slice(first, first + root.shape[2])
    snapped = x.clone(memory_format=torch.contiguous_format)
    snapped[:, :, video] = x[:, :, video].gather(2, root.expand(*root.shape[:3], x.shape[3]))
    moved = (root != torch.arange(root.shape[2])[:, None]).sum(2, dtype=torch.int32)
    return snapped, moved.expand(*x.shape[:2], x.shape[3]).contiguous()


def _cpu_roots(
    x: Tensor, theta: Tensor, *, frames: int, height: int, width: int, first: int, axes: list[int], window: int
) -> Tensor:
    _require(ROOTS_CONTRACT, x, theta, None, None, (frames, height, width), first, axes, window, "token")
    return roots_reference(x, theta, frames=frames, height=height, width=width, first=first, axes=axes, window=window)


def _roots(
    x: Tensor, theta: Tensor, groups: Sequence[int], factors: Sequence[float], grid: tuple[int, int, int], first: int,
    axes: Sequence[int], window: int, granularity: str,
) -> Tensor:  # fmt: skip
    """Roots of the video tokens, counted from the first of them, int64 ``[B, H, T * Hh * W, D]``, or 1 for D."""
    limit, wide = _limits(x, theta, groups, factors), 1 if granularity == "token" else x.shape[3]
    video = x[:, :, first : first + math.prod(grid)].unflatten(2, grid)
    back = torch.zeros((*video.shape[:-1], wide), dtype=torch.int64, device=x.device)
    for axis in sorted(axes, reverse=True):
        for steps, delta in _deltas(video, back, axis, window):
            flagged = (_shared(delta, groups, granularity) < limit)[..., :wide]
            for k in range(1, window):
                steps.select(axis + 3, k).masked_fill_(flagged, k * math.prod(grid[axis + 1 :]))
    root = torch.arange(math.prod(grid), device=x.device)[:, None] - back.flatten(2, 4)
    for _ in range(2):  # three steps at most, and each time they double
        root = root.gather(2, root)
    return root


def critical_theta(
    x: Tensor, groups: Sequence[int], factors: Sequence[float], *,
    frames: int, height: int, width: int, first: int, axes: Sequence[int], window: int, granularity: str,
) -> Tensor:  # fmt: skip
    """The threshold above which each element is reused, infinity where it never is: what a calibrator counts.

    Returns:
        float32 ``[B, H, N, D]``, all tokens; arguments as in `snap_tokens`.
    """
    grid = (frames, height, width)
    least = torch.full(x.shape, torch.inf, device=x.device)
    factor = torch.tensor(factors, device=x.device).repeat_interleave(torch.tensor(groups, device=x.device))
    video, into = (t[:, :, first : first + math.prod(grid)].unflatten(2, grid) for t in (x, least))
    for axis in axes:
        for part, delta in _deltas(video, into, axis, window):
            needed = _shared(delta, groups, granularity) / factor
            for k in range(1, window):
                element = part.select(axis + 3, k)
                element.copy_(torch.minimum(element, needed.nan_to_num(torch.inf, torch.inf)))
    return least


def _deltas(video: Tensor, other: Tensor, axis: int, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole windows of another tensor along an axis, their tokens in dimension axis + 3, and Delta without it."""
    dim = axis + 2
    whole = video.shape[dim] // window * window
    if not whole:
        return
    values, part = (t.narrow(dim, 0, whole).unflatten(dim, (whole // window, window)) for t in (video, other))
    values = values.float()
    if window == 2:
        yield part, values.select(dim + 1, 1).sub(values.select(dim + 1, 0)).abs_().mul_(0.5)
    else:
        yield part, values.var(dim + 1, correction=0).sqrt_()


def _cuda(
    x: Tensor, theta: Tensor, groups: list[int], factors: list[float], *,
    frames: int, height: int, width: int, first: int, axes: list[int], window: int, granularity: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grid = (frames, height, width)
    with CONTRACT.on_cuda(x.device):
        from .snap_tokens_triton import launch

        _require(CONTRACT, x, theta, groups, factors, grid, first, axes, window, granularity)
        return launch(x, theta, groups, factors, grid, first, axes, window, granularity)


def _cuda_roots(
    x: Tensor, theta: Tensor, *, frames: int, height: int, width: int, first: int, axes: list[int], window: int
) -> Tensor:
    grid = (frames, height, width)
    with ROOTS_CONTRACT.on_cuda(x.device):
        from .snap_tokens_triton import launch_roots

        _require(ROOTS_CONTRACT, x, theta, None, None, grid, first, axes, window, "token")
        return launch_roots(x, theta, grid, first, axes, window)


def _require(
    contract: Contract, x: Tensor, theta: Tensor, groups: Sequence[int] | None, factors: Sequence[float] | None,
    grid: tuple[int, int, int], first: int, axes: Sequence[int], window: int, granularity: str, proved: bool = True,
) -> None:  # fmt: skip
    sizes = dict(zip(("frames", "height", "width"), grid, strict=True))
    contract.require(x=x, theta=theta, **sizes, first=first, window=window, proved=proved)
    reason = misfit(x.shape, groups, factors, grid, first, axes, granularity)
    if reason is not None:
        raise InvalidArgument(f"{contract.operator}: {reason}")


def misfit(
    shape: Sequence[int], groups: Sequence[int] | None, factors: Sequence[float] | None, grid: Sequence[int],
    first: int, axes: Sequence[int], granularity: str,
) -> str | None:  # fmt: skip
    """The first relation between arguments that fails, or ``None``; symbolic sizes are not compared."""
    if granularity not in get_args(Granularity):
        return f"got granularity {granularity!r}, expected {', '.join(get_args(Granularity))}"
    if not axes or any(axis not in (0, 1, 2) for axis in axes) or len(set(axes)) != len(axes):
        return f"got axes {list(axes)}, expected some of 0 (t), 1 (h) and 2 (w)"
    if groups is not None and factors is not None:
        if any(size < 1 for size in groups) or sum(groups) != shape[3]:
            return f"got groups of {list(groups)} channels, expected {shape[3]} together"
        if len(groups) != len(factors):
            return f"got {len(factors)} factors for {len(groups)} groups"
        if granularity == "token" and len(set(factors)) > 1:
            return f"got factors {list(factors)}, expected equal ones: a whole token has one threshold"
    known = [*grid, first, shape[2]]
    if all(isinstance(size, int) for size in known) and first + grid[0] * grid[1] * grid[2] > shape[2]:
        return f"got a grid of {' x '.join(map(str, grid))} from token {first} on, and {shape[2]} tokens"
    return None


torch.library.impl("graphwright::snap_tokens", "cpu", _cpu)
torch.library.impl("graphwright::snap_tokens", "cuda", _cuda)
torch.library.impl("graphwright::token_roots", "cpu", _cpu_roots)
torch.library.impl("graphwright::token_roots", "cuda", _cuda_roots)
register(torch.ops.graphwright.snap_tokens.default, reference, CONTRACT)
register(torch.ops.graphwright.token_roots.default, roots_reference, ROOTS_CONTRACT)
