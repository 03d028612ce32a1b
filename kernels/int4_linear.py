"""A linear layer with 4-bit weights in groups and activations of 4 or 8 bits, quantized per token when it runs.

    x'      = x, or x H with the Hadamard matrix H of its width (`hadamard=True`; the weight must be W H then)
    u, s    = the integers [T, K] and steps [T] of x' on each token's grid (`token_grid.py`)
    y[t, n] = (sum_k u[t, k] step[k // g, n] q[n, k]) scale[n] s[t] + bias[n]       int32 sum, float32 epilogue

Shapes: x ``[..., K]`` with any number of tokens, also none; weight ``[ceil(N / 64), K, 32]``, steps ``[K / g, P]`` with
P = N rounded up to 64, scale, sums and bias ``[N]`` (`int4_weights.Int4`); y ``[..., N]``. Dtypes: x and y float32,
float16 or bfloat16. K <= 32768, g one of 32, 64, 128 and 256.

What 4 bits give. Weights take an eighth of float32's memory, a quarter of float16's. Activations of 4 bits give no
speed: no tensor core since Hopper multiplies 4-bit integers, and no CPU instruction does, so both widths run as 8-bit
products, on weights that are made 8 bits in registers (GPU) or in the cache (CPU). They are here to compare methods in
the terms of the literature, and for devices that multiply them.

Zeros: a token of zeros gives the bias exactly. A token with a NaN or an infinity gives NaN in all its outputs. Kernels
make the same integers (but for ties where `hadamard` rounds differently) and sum them exactly, except that on a CPU up
to 8 tokens go through PyTorch's product of 4-bit weights where it is fast, which rounds each sum to bfloat16: an error
of 2^-9 of it, less than what rounding to 8 bits costs.

Source: symmetric weights in groups, asymmetric tokens: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), section 4;
whole steps: QServe (Lin et al. 2024, arXiv:2405.04532).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hadamard as rotation
from . import int4_linear_cpu
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .int4_weights import GROUPS, ROWS, Int4, unpack
from .token_grid import quantize_tokens

CONTRACT = Contract(
    "int4_linear",
    {
        "x": Argument("... K", FLOATS),
        "weight": Argument("B K H", (torch.uint8,)),
        "steps": Argument("G P", (torch.int8,)),
        "scale": Argument("N", (torch.float32,)),
        "sums": Argument("N", (torch.int32,)),
        "bias": Argument("N", FLOATS, optional=True),
    },
    # The sum and its correction: (128 + 383) * 128 * 32768 < 2^31.
    sizes={
        "K": Size(minimum=32, maximum=32768, multiple_of=32),
        "N": Size(minimum=1),
        "P": Size(multiple_of=ROWS),
        "H": Size(one_of=(ROWS // 2,)),
        "bits": Size(one_of=(4, 8)),
    },
    capability=(8, 0),
)


def reference(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    clip: float = 1.0,
    hadamard: bool = False,
) -> Tensor:
    """The formula in float operators; integer sums in float64, which is exact."""
    tokens = rotation.reference(x.float()) if hadamard else x.float()
    values, step, _ = quantize_tokens(tokens, bits, clip)
    whole = unpack(weight, steps)[:, : len(scale)].double()
    y = (values.double() @ whole).float() * scale * step
    return (y if bias is None else y + bias.float()).to(x.dtype)


@torch.library.custom_op("graphwright::int4_linear", mutates_args=())
def int4_linear(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    clip: float = 1.0,
    hadamard: bool = False,
) -> Tensor:
    """W4A8 or W4A4 linear layer: x ``[..., K]`` and an `Int4` weight to ``[..., N]``.

    Raises:
        InvalidArgument: A dtype, shape or option that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


@int4_linear.register_fake
def _fake(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    clip: float = 1.0,
    hadamard: bool = False,
) -> Tensor:
    _require(x, weight, steps, scale, sums, bias, bits=bits, proved=False)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def layout_reason(specs: Mapping[str, Any]) -> str | None:
    """What letters cannot say of `weight`, `steps` and `scale`: blocks of 64 channels, whole groups of a known size."""
    (blocks, k, _), (groups, padded), (n,) = (specs[name].shape for name in ("weight", "steps", "scale"))
    if blocks != -(-n // ROWS) or padded != blocks * ROWS:
        return f"got {blocks} blocks and {padded} padded channels, expected blocks of {ROWS} for N={n}"
    if groups < 1 or k % groups or k // groups not in GROUPS:
        return f"got {groups} groups of {k} channels, expected groups of {GROUPS}"
    return None


_require = CONTRACT.requirement(layout_reason)


class _Call(NamedTuple):
    """The operator's arguments, as they are handed to its kernels."""

    x: Tensor
    weight: Tensor
    steps: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None = None
    bits: int = 8
    clip: float = 1.0
    hadamard: bool = False

    def required(self) -> tuple[Tensor, Int4, Tensor | None, int, float, bool]:
        """What the kernels take, once it was checked."""
        x, *weight, bias, bits, clip, hadamard = self
        _require(x, *weight, bias, bits=bits)
        return x, Int4(*weight), bias, bits, clip, hadamard


def _cpu(*arguments: Any) -> Tensor:
    return int4_linear_cpu.compute(*_Call(*arguments).required())


def _cuda(*arguments: Any) -> Tensor:
    with CONTRACT.on_cuda(arguments[0].device):
        from .int4_linear_triton import launch

        return launch(*_Call(*arguments).required())


torch.library.impl("graphwright::int4_linear", "cpu", _cpu)
torch.library.impl("graphwright::int4_linear", "cuda", _cuda)
register(torch.ops.graphwright.int4_linear.default, reference, CONTRACT)
