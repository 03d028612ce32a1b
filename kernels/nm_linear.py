"""A linear layer whose input is made n:m sparse first, in one operator.

    y = nm_sparsify(x, factors, n, m) weight^T + bias

Shapes: x ``[..., K]``, factors ``[K]`` float32 or None, weight ``[N, K]``, bias ``[N]`` or None; y ``[..., N]``.
Dtypes: x, weight, bias and y alike, float32, float16 or bfloat16.

On CUDA, 2:4 in 16-bit types goes through PyTorch's semi-structured kernels: the selected tokens are compressed as the
program runs, and sparse tensor cores multiply half as much (`semi_structured_reason` says where they can). Everything
else is a selection and a dense product, so it computes what those two compute, and saves nothing.

Source: 2:4 sparse tensor cores on the left operand, Haziza et al. 2025, arXiv:2503.16672 (up to 1.3x of an FFN).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .nm_sparsify import BLOCKS, nm_sparsify, pattern_reason
from .nm_sparsify import reference as select

CONTRACT = Contract(
    "nm_linear",
    {
        "x": Argument("... K", FLOATS),
        "factors": Argument("K", (torch.float32,), optional=True),
        "weight": Argument("N K", FLOATS),
        "bias": Argument("N", FLOATS, optional=True),
    },
    sizes={
        "m": Size(one_of=BLOCKS),
        "n": Size(minimum=1),
        "K": Size(minimum=1, multiple_of="m"),
        "N": Size(minimum=1),
    },
    capability=(8, 0),
)
HALVES = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64
"""What the 16-bit sparse kernels want of the sparse operand: rows a multiple of 32, columns of 64."""


def reference(x: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """The formula."""
    return F.linear(select(x, factors, n, m), weight, bias)


@torch.library.custom_op("graphwright::nm_linear", mutates_args=())
def nm_linear(x: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """Select n of every m channels of x ``[..., K]``, then multiply by weight ``[N, K]``.

    Raises:
        InvalidArgument: A dtype, shape or pattern that ``CONTRACT`` does not hold, n > m, or types that differ.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


def semi_structured_reason(x: Tensor, weight: Tensor, n: int, m: int) -> str | None:
    """Why the product cannot run on semi-structured sparse kernels, or None. Tokens are looked at when it runs."""
    if (n, m) != (2, 4):
        return f"sparse tensor cores know 2:4, got {n}:{m}"
    if x.device.type != "cuda":
        return f"sparse tensor cores are of CUDA devices, got {x.device.type}"
    if x.dtype not in HALVES or weight.dtype != x.dtype:
        return f"sparse tensor cores multiply 16-bit floats, got {x.dtype} by {weight.dtype}"
    rows, columns = weight.shape
    if rows % _COLUMNS or columns % _COLUMNS:
        return f"the sparse kernels want multiples of {_COLUMNS}, got {columns} -> {rows}"
    return None


@nm_linear.register_fake
def _fake(x: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    _require(x, factors, weight, bias, n, m, proved=False)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _dense(x: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    _require(x, factors, weight, bias, n, m)
    return F.linear(nm_sparsify(x, factors, n, m), weight, bias)


def _cuda(x: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    tokens = x.numel() // x.shape[-1]
    if tokens % _ROWS or not tokens or semi_structured_reason(x, weight, n, m) is not None:
        return _dense(x, factors, weight, bias, n, m)
    _require(x, factors, weight, bias, n, m)
    from torch.sparse import to_sparse_semi_structured

    kept = nm_sparsify(x, factors, n, m).view(tokens, -1)
    y = torch.mm(to_sparse_semi_structured(kept), weight.t())
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def _require(
    x: Tensor,
    factors: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    proved: bool = True,
) -> None:
    CONTRACT.require(x=x, factors=factors, weight=weight, bias=bias, n=n, m=m, proved=proved)
    reason = pattern_reason(n, m)
    others = {t.dtype for t in (weight, bias) if t is not None} - {x.dtype}
    if reason is None and others:
        reason = f"got x of {x.dtype} and {others.pop()}, expected one type"
    if reason is not None:
        raise InvalidArgument(f"{CONTRACT.operator}: {reason}")


torch.library.impl("graphwright::nm_linear", "cpu", _dense)
torch.library.impl("graphwright::nm_linear", "cuda", _cuda)
register(torch.ops.graphwright.nm_linear.default, reference, CONTRACT)
