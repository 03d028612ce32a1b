"""A linear layer with 4-bit weights in groups and activations as they are (W4A16): memory, and speed at few tokens.

    y[t, n] = (sum_k x[t, k] step[k // g, n] q[n, k]) scale[n] + bias[n]

Shapes and dtypes as `int4_linear`, without activations to quantize. The weights `step q` are whole numbers of 8 bits,
exact in float16 and bfloat16; sums are float32.

Few tokens wait for the weights' memory, of which there is an eighth. Many tokens gain nothing: the product runs in x's
own precision on weights that are widened first. On a CPU up to 8 tokens go through PyTorch's product of 4-bit weights
where it is fast: x and the sum are rounded to bfloat16 there, 2^-9 of each, also where x is float32.

Source: weight-only quantization in groups: GPTQ (Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .int4_linear import layout_reason
from .int4_linear_cpu import packed_product, packed_product_is_fast
from .int4_weights import ROWS, unpack

CONTRACT = Contract(
    "int4_weight_linear",
    {
        "x": Argument("... K", FLOATS),
        "weight": Argument("B K H", (torch.uint8,)),
        "steps": Argument("G P", (torch.int8,)),
        "scale": Argument("N", (torch.float32,)),
        "bias": Argument("N", FLOATS, optional=True),
    },
    sizes={
        "K": Size(minimum=32, maximum=32768, multiple_of=32),
        "N": Size(minimum=1),
        "P": Size(multiple_of=ROWS),
        "H": Size(one_of=(ROWS // 2,)),
    },
    capability=(8, 0),
)
_FEW = 8
"""As in `int4_linear`."""


def reference(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in float32."""
    y = (x.float() @ unpack(weight, steps)[:, : len(scale)].float()) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@torch.library.custom_op("graphwright::int4_weight_linear", mutates_args=())
def int4_weight_linear(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """W4A16 linear layer: x ``[..., K]`` and an `Int4` weight to ``[..., N]``.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


@int4_weight_linear.register_fake
def _fake(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _require(x, weight, steps, scale, bias, proved=False)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _cpu(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _require(x, weight, steps, scale, bias)
    tokens = x.reshape(-1, x.shape[-1])
    n = len(scale)
    if len(tokens) <= _FEW and packed_product_is_fast():
        product = packed_product(tokens, weight, steps, n)
    else:
        product = tokens.float() @ unpack(weight, steps)[:, :n].float()
    y = product.mul_(scale) if bias is None else torch.addcmul(bias.float(), product, scale)
    return y.to(x.dtype).view(*x.shape[:-1], n)


def _cuda(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    with CONTRACT.on_cuda(x.device):
        from .int4_weight_linear_triton import launch

        _require(x, weight, steps, scale, bias)
        return launch(x, weight, steps, scale, bias)


_require = CONTRACT.requirement(layout_reason)

torch.library.impl("graphwright::int4_weight_linear", "cpu", _cpu)
torch.library.impl("graphwright::int4_weight_linear", "cuda", _cuda)
register(torch.ops.graphwright.int4_weight_linear.default, reference, CONTRACT)
