"""An int8 linear layer whose input is made n:m sparse before it is quantized.

    y = int8_linear(nm_sparsify(x, factors, n, m), weight, scale, bias)

Shapes: x ``[..., K]``, factors float32 ``[K]`` or None, weight int8 ``[N, K]``, scale float32 ``[N]``, bias ``[N]``;
y ``[..., N]``. Dtypes, rounding and special values are those of the two. The step of a token comes from what is kept,
so it is that of the whole token unless the factors drop its largest value.

The Triton kernel selects and quantizes in one pass over a token: it is read once, and written once, as int8. The CPU
runs the two operators one after the other.

Source: Outstanding-sparse, the union of n:m activations and W8A8 in Amber Pruner (arXiv:2508.02128).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import int8_linear as dense
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .nm_sparsify import BLOCKS, nm_sparsify, pattern_reason
from .nm_sparsify import reference as select

CONTRACT = Contract(
    "nm_int8_linear",
    {
        "x": Argument("... K", FLOATS),
        "factors": Argument("K", (torch.float32,), optional=True),
        "weight": Argument("N K", (torch.int8,)),
        "scale": Argument("N", (torch.float32,)),
        "bias": Argument("N", FLOATS, optional=True),
    },
    sizes={
        "m": Size(one_of=BLOCKS),
        "n": Size(minimum=1),
        "K": Size(minimum=1, maximum=131072, multiple_of="m"),
        "N": Size(minimum=1),
    },
    capability=(8, 0),
)


def reference(
    x: Tensor, factors: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """The formula, by the two references."""
    return dense.reference(select(x, factors, n, m), weight, scale, bias)


@torch.library.custom_op("graphwright::nm_int8_linear", mutates_args=())
def nm_int8_linear(
    x: Tensor, factors: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """Keep n of every m channels of x ``[..., K]``, quantize, multiply by int8 ``[N, K]``, to ``[..., N]``.

    Raises:
        InvalidArgument: A dtype, shape or pattern that ``CONTRACT`` does not hold, or n > m.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


@nm_int8_linear.register_fake
def _fake(
    x: Tensor, factors: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    _require(x, factors, weight, scale, bias, n, m, proved=False)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _cpu(
    x: Tensor, factors: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    # Each of the two checks its own arguments.
    return dense.int8_linear(nm_sparsify(x, factors, n, m), weight, scale, bias)


def _cuda(
    x: Tensor, factors: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    with CONTRACT.on_cuda(x.device):
        from .nm_int8_linear_triton import launch

        _require(x, factors, weight, scale, bias, n, m)
        return launch(x, factors, weight, scale, bias, n, m)


def _require(
    x: Tensor,
    factors: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    proved: bool = True,
) -> None:
    CONTRACT.require(x=x, factors=factors, weight=weight, scale=scale, bias=bias, n=n, m=m, proved=proved)
    if (reason := pattern_reason(n, m)) is not None:
        raise InvalidArgument(f"{CONTRACT.operator}: {reason}")


torch.library.impl("graphwright::nm_int8_linear", "cpu", _cpu)
torch.library.impl("graphwright::nm_int8_linear", "cuda", _cuda)
register(torch.ops.graphwright.nm_int8_linear.default, reference, CONTRACT)
