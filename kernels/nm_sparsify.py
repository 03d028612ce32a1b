"""Keep n of every m neighbouring channels of each token, the others become zero: n:m sparsity of an activation.

    score[t, k] = |x[t, k]| factors[k]                                             float32, one rounding
    rank[t, k]  = number of j in k's block with score[j] > score[k], or equal and j < k
    y[t, k]     = x[t, k] if rank[t, k] < n else 0                                 a block: channels m b .. m b + m - 1

Exactly n of each block are kept, ties go to the lowest channel. Values that are kept are kept bit by bit: factors only
rank. A NaN ranks above infinity, so a token with one or more of them keeps (up to n of) them.

Shapes: x ``[..., K]`` with any number of tokens, also none, m divides K; factors ``[K]`` or None for ones; y like x.
Dtypes: x float32, float16 or bfloat16; factors float32, not negative. n is 1 to m; m is 4, 8, 16 or 32.

Scores compare as the integers that their bits are, which orders floats that are not negative; so every kernel, whatever
its order of work, keeps the same channels.

Source: Amber Pruner (arXiv:2508.02128), N:M activation sparsity in prefill; factors there are column norms of the
weight (as in Wanda: Sun et al. 2023, arXiv:2306.11695).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .nm_sparsify_cpu import select

BLOCKS = (4, 8, 16, 32)
"""Channels of a block. NVIDIA's sparse tensor cores know 2:4 alone (1:2 for tf32); the others are masks."""

CONTRACT = Contract(
    "nm_sparsify",
    {"x": Argument("... K", FLOATS), "factors": Argument("K", (torch.float32,), optional=True)},
    sizes={"m": Size(one_of=BLOCKS), "n": Size(minimum=1), "K": Size(minimum=1, multiple_of="m")},
    capability=(8, 0),
)


def reference(x: Tensor, factors: Tensor | None, n: int, m: int) -> Tensor:
    """The formula, by a stable sort."""
    scores = x.float().abs() if factors is None else x.float().abs() * factors
    keys = scores.contiguous().view(torch.int32).bitwise_and_(0x7FFFFFFF).view(-1, m)
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, order[:, :n], True)
    return torch.where(keep.view(x.shape), x, 0)


@torch.library.custom_op("graphwright::nm_sparsify", mutates_args=())
def nm_sparsify(x: Tensor, factors: Tensor | None, n: int, m: int) -> Tensor:
    """Keep the n channels of largest score of every m: x ``[..., K]``, factors float32 ``[K]`` or None, to x's shape.

    Raises:
        InvalidArgument: A dtype, shape or pattern that ``CONTRACT`` does not hold, or n > m.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


def pattern_reason(n: int, m: int) -> str | None:
    """Why there is no pattern n:m, or None."""
    if m not in BLOCKS:
        return f"got m={m}, expected {' or '.join(map(str, BLOCKS))}"
    return None if 1 <= n <= m else f"got n={n} of m={m}, expected 1 to {m}"


@nm_sparsify.register_fake
def _fake(x: Tensor, factors: Tensor | None, n: int, m: int) -> Tensor:
    require(x, factors, n=n, m=m, proved=False)
    return x.new_empty(x.shape)


def _cpu(x: Tensor, factors: Tensor | None, n: int, m: int) -> Tensor:
    require(x, factors, n=n, m=m)
    made = select(x, factors, n, m)
    return reference(x, factors, n, m) if made is None else made


def _cuda(x: Tensor, factors: Tensor | None, n: int, m: int) -> Tensor:
    with CONTRACT.on_cuda(x.device):
        from .nm_sparsify_triton import launch

        require(x, factors, n=n, m=m)
        return launch(x, factors, n, m)


require = CONTRACT.requirement(lambda given: pattern_reason(given["n"], given["m"]))
"""Raises what is wrong with x, factors and, by name, n and m."""

torch.library.impl("graphwright::nm_sparsify", "cpu", _cpu)
torch.library.impl("graphwright::nm_sparsify", "cuda", _cuda)
register(torch.ops.graphwright.nm_sparsify.default, reference, CONTRACT)
