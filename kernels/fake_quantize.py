"""Round to an asymmetric grid of few bits and back, per group of the last dimension: what a quantized cache would hold.

    low = clip min(min(x), 0),  high = clip max(max(x), 0)       over each group of g channels of a row
    s = (high - low) / levels,  z = round(-low / s),  levels = 2^bits - 1
    y = s (clamp(round(x / s) + z, 0, levels) - z)

Shapes: x ``[..., K]``, g divides K; y like x. Dtypes float32, float16, bfloat16; arithmetic in float32. A group that
holds NaN or infinity becomes NaN.

This saves no memory and costs time: y has x's dtype. It shows what the quality of a cache of 2 to 8 bits is, before it
is stored packed.

Source: KV-cache quantization as QuaRot has it (Ashkboos et al. 2024, arXiv:2404.00456): asymmetric, a group a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .token_grid import token_grid

CONTRACT = Contract(
    "fake_quantize",
    {"x": Argument("... K", FLOATS)},
    sizes={
        "K": Size(minimum=1, multiple_of="group"),
        "bits": Size(minimum=2, maximum=8),
        "group": Size(minimum=1, maximum=4096),
    },
    capability=(8, 0),
)


def reference(x: Tensor, bits: int, group: int, clip: float = 1.0) -> Tensor:
    """The formula."""
    rows = x.float().reshape(-1, group)
    step, zero = token_grid(rows, bits, clip)
    return ((rows / step).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero) * step).view(x.shape).to(x.dtype)


@torch.library.custom_op("graphwright::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, bits: int, group: int, clip: float = 1.0) -> Tensor:
    """Round ``[..., K]`` to ``bits`` bits in groups, and back.

    Raises:
        InvalidArgument: A dtype, shape or option that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


@fake_quantize.register_fake
def _fake(x: Tensor, bits: int, group: int, clip: float = 1.0) -> Tensor:
    _require(x, bits, group, clip, proved=False)
    return x.new_empty(x.shape)


def _cpu(x: Tensor, bits: int, group: int, clip: float = 1.0) -> Tensor:
    _require(x, bits, group, clip)
    return reference(x, bits, group, clip)


def _cuda(x: Tensor, bits: int, group: int, clip: float = 1.0) -> Tensor:
    with CONTRACT.on_cuda(x.device):
        from .fake_quantize_triton import launch

        _require(x, bits, group, clip)
        return launch(x, bits, group, clip)


def _require(x: Tensor, bits: int, group: int, clip: float, proved: bool = True) -> None:
    CONTRACT.require(x=x, bits=bits, group=group, proved=proved)
    if not 0 < clip <= 1:
        raise InvalidArgument(f"{CONTRACT.operator}: got clip={clip}, expected a share in (0, 1]")


torch.library.impl("graphwright::fake_quantize", "cpu", _cpu)
torch.library.impl("graphwright::fake_quantize", "cuda", _cuda)
register(torch.ops.graphwright.fake_quantize.default, reference, CONTRACT)
