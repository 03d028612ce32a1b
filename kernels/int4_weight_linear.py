"""A linear layer with 4-bit weights in groups and activations as they are (W4A16): memory, and speed at few tokens.

    y[t, n] = (sum_k x[t, k] step[k // g, n] q[n, k]) scale[n] + bias[n]

Shapes and dtypes as `int4_linear`, without activations to quantize. The weights `step q` are whole numbers of 8 bits,
exact in float16 and bfloat16; sums are float32.

Few tokens wait for the weights' memory, of which there is an eighth. Many tokens gain nothing: the product runs in x's
own precision on weights that are widened first. On a CPU up to 8 tokens go through PyTorch's product of 4-bit weights
where it is fast: x and the sum are rounded to bfloat16 there, 2^-9 of each, also where x is float32.

Source: weight-only quantization in groups: GPTQ (Frantar et al. 2022, arXiv:2210.17323).
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .contract import FLOATS, Argument, Contract, Size, Spec, missing_kernel, register
from .int4_linear import HAS_TRITON, _jit_any_m, check_layout, choose_config, packed_product, packed_product_is_fast
from .int4_weights import ROWS, unpack

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

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
    CONTRACT.require(x=x, weight=weight, steps=steps, scale=scale, bias=bias, proved=False)
    check_layout(CONTRACT.operator, weight.shape, steps.shape, scale.shape)
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
    if not HAS_TRITON:
        raise missing_kernel(CONTRACT.operator, x.device, "triton is not installed (pip install triton)")
    _require(x, weight, steps, scale, bias)
    if (reason := _missing_on(x.device)) is not None:
        raise missing_kernel(CONTRACT.operator, x.device, reason)
    with torch.cuda.device(x.device):
        return launch(x, weight, steps, scale, bias)


@cache
def _missing_on(device: torch.device) -> str | None:
    return CONTRACT.check_device(device)


def _require(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    rest = (None, None) if bias is None else (bias.shape, bias.dtype)
    _require_specs(*(fact for tensor in (x, weight, steps, scale) for fact in (tensor.shape, tensor.dtype)), *rest)


@lru_cache(maxsize=1024)
def _require_specs(*facts: Any) -> None:
    pairs = zip(CONTRACT.arguments, facts[::2], facts[1::2], strict=True)
    CONTRACT.require(**{name: None if dtype is None else Spec(shape, dtype) for name, shape, dtype in pairs})
    check_layout(CONTRACT.operator, facts[2], facts[4], facts[6])


def launch(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run the Triton kernel, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = tokens.shape, len(scale)
    y = x.new_empty(m, n)
    if m > 0:
        group = k // len(steps)
        config = choose_config(m, n, group)
        half, block_k = 32, min(config.block_k, 64)
        grid = (triton.cdiv(m, min(config.block_m, 64)) * triton.cdiv(steps.shape[1], 2 * half),)
        _gemm_kernel[grid](
            tokens, weight, steps, scale, scale if bias is None else bias.contiguous(), y, m, n, k, steps.shape[1],
            HAS_BIAS=bias is not None, GROUP=group,
            BLOCK_M=min(config.block_m, 64), HALF=half, BLOCK_K=block_k, num_warps=4, num_stages=config.num_stages,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n)


@_jit_any_m
def _gemm_kernel(
    x, weight, steps, scale, bias, y, M, N, K, P,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y a program, as in `int4_linear`, on weights widened to x's dtype in registers."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(P, 2 * HALF)
    rows = program // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    packed = program % tiles_n * HALF + tl.arange(0, HALF)
    low = (packed // 32 * 64 + packed % 32) % P
    high = low + 32
    ks = tl.arange(0, BLOCK_K)
    left = x + (rows % M).to(tl.int64)[:, None] * K + ks[None, :]
    right = weight + (low // 64).to(tl.int64)[None, :] * K * 32 + ks[:, None] * 32 + (packed % 32)[None, :]
    total_low = tl.zeros([BLOCK_M, HALF], tl.float32)
    total_high = tl.zeros([BLOCK_M, HALF], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(left)
        pair = tl.load(right)
        group = steps + start // GROUP * P
        b = (((pair & 15).to(tl.int8) - 8) * tl.load(group + low)[None, :]).to(a.dtype)
        total_low = tl.dot(a, b, total_low, input_precision="ieee")
        b = (((pair >> 4).to(tl.int8) - 8) * tl.load(group + high)[None, :]).to(a.dtype)
        total_high = tl.dot(a, b, total_high, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K * 32
    inside = (rows < M)[:, None]
    for_low = low < N
    for_high = high < N
    first = total_low * tl.load(scale + low, mask=for_low, other=0.0)[None, :]
    second = total_high * tl.load(scale + high, mask=for_high, other=0.0)[None, :]
    if HAS_BIAS:
        first += tl.load(bias + low, mask=for_low, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias + high, mask=for_high, other=0.0).to(tl.float32)[None, :]
    start_of_row = y + rows.to(tl.int64)[:, None] * N
    tl.store(start_of_row + low[None, :], first.to(y.dtype.element_ty), mask=inside & for_low[None, :])
    tl.store(start_of_row + high[None, :], second.to(y.dtype.element_ty), mask=inside & for_high[None, :])


torch.library.impl("graphwright::int4_weight_linear", "cpu", _cpu)
torch.library.impl("graphwright::int4_weight_linear", "cuda", _cuda)
register(torch.ops.graphwright.int4_weight_linear.default, reference, CONTRACT)
