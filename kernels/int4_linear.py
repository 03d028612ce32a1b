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

from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import hadamard as rotation
from . import int4_linear_cpu
from .contract import FLOATS, Argument, Contract, Size, Spec, missing_kernel, register
from .int4_weights import GROUPS, ROWS, unpack
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
    CONTRACT.require(x=x, weight=weight, steps=steps, scale=scale, sums=sums, bias=bias, bits=bits, proved=False)
    check_layout(CONTRACT.operator, weight.shape, steps.shape, scale.shape)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def check_layout(operator: str, weight: Any, steps: Any, scale: Any) -> None:
    """What letters cannot say: blocks of 64 channels, and whole groups of a known size.

    Raises:
        InvalidArgument: One of them is not so.
    """
    blocks, k, n = weight[0], weight[1], scale[0]
    if blocks != -(-n // ROWS) or steps[1] != blocks * ROWS:
        raise InvalidArgument(
            f"{operator}: got {blocks} blocks and {steps[1]} padded channels, expected blocks of {ROWS} for N={n}"
        )
    if steps[0] < 1 or k % steps[0] or k // steps[0] not in GROUPS:
        raise InvalidArgument(f"{operator}: got {steps[0]} groups of {k} channels, expected groups of {GROUPS}")


def _cpu(
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
    _require(x, weight, steps, scale, sums, bias, bits)
    return int4_linear_cpu.compute(x, weight, steps, scale, sums, bias, bits, clip, hadamard)


def _cuda(
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
    if find_spec("triton") is None:
        raise missing_kernel(CONTRACT.operator, x.device, "triton is not installed (pip install triton)")
    from .int4_linear_triton import launch

    _require(x, weight, steps, scale, sums, bias, bits)
    if (reason := _missing_on(x.device)) is not None:
        raise missing_kernel(CONTRACT.operator, x.device, reason)
    with torch.cuda.device(x.device):
        return launch(x, weight, steps, scale, sums, bias, bits, clip, hadamard)


@cache
def _missing_on(device: torch.device) -> str | None:
    return CONTRACT.check_device(device)


def _require(
    x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, bits: int
) -> None:
    rest = (None, None) if bias is None else (bias.shape, bias.dtype)
    tensors = (x, weight, steps, scale, sums)
    _require_specs(bits, *(fact for tensor in tensors for fact in (tensor.shape, tensor.dtype)), *rest)


@lru_cache(maxsize=1024)
def _require_specs(bits: int, *facts: Any) -> None:
    pairs = zip(CONTRACT.arguments, facts[::2], facts[1::2], strict=True)
    specs = {name: None if dtype is None else Spec(shape, dtype) for name, shape, dtype in pairs}
    CONTRACT.require(**specs, bits=bits)
    check_layout(CONTRACT.operator, facts[2], facts[4], facts[6])


torch.library.impl("graphwright::int4_linear", "cpu", _cpu)
torch.library.impl("graphwright::int4_linear", "cuda", _cuda)
register(torch.ops.graphwright.int4_linear.default, reference, CONTRACT)
