"""`int4_linear` on the CPU: few tokens by PyTorch's own product of 4-bit weights, many by an exact product of int8.

Unpacked weights live for one call, in the cache.
"""

from __future__ import annotations

from functools import cache, reduce

import torch
from torch import Tensor

from . import hadamard as rotation
from .int4_weights import Int4, unpack
from .int8_linear import _int_mm_is_exact_and_fast
from .token_grid import quantize_tokens, token_grid

_FEW = 8
"""Tokens up to which PyTorch's product of 4-bit weights beats unpacking: one token of 576 -> 1536 takes 57 us, 16 take
375; unpacking takes 206 and the integer product 70 more (one thread of a Xeon with AMX)."""


def compute(x: Tensor, weight: Int4, bias: Tensor | None, bits: int, clip: float, hadamard: bool) -> Tensor:
    """`int4_linear` on the CPU, arguments unchecked."""
    tokens = x.reshape(-1, x.shape[-1])
    n = len(weight.scale)
    if bias is not None:
        bias = bias.float()
    if len(tokens) <= _FEW and packed_product_is_fast():
        rows = rotation.rotated(tokens.float()) if hadamard else tokens.float()
        values, step, _ = quantize_tokens(rows, bits, clip)
        total = packed_product(values, weight.packed, weight.steps, n).mul_(weight.scale)
        y = total.mul_(step) if bias is None else torch.addcmul(bias, total, step, out=total)
        return y.to(x.dtype).view(*x.shape[:-1], n)
    whole = unpack(weight.packed, weight.steps)
    whole = whole if whole.shape[1] == n else whole[:, :n].contiguous()
    epilogue = (weight.scale, weight.sums.float(), bias)
    if len(tokens) <= _BLOCK:
        return _cpu_block(tokens, whole, epilogue, bits, clip, hadamard).view(*x.shape[:-1], n)
    y = x.new_empty(len(tokens), n)
    for out, block in zip(y.split(_BLOCK), tokens.split(_BLOCK), strict=True):
        out.copy_(_cpu_block(block, whole, epilogue, bits, clip, hadamard))
    return y.view(*x.shape[:-1], n)


_BLOCK = 512


def _cpu_block(
    tokens: Tensor,
    whole: Tensor,
    epilogue: tuple[Tensor, Tensor, Tensor | None],
    bits: int,
    clip: float,
    hadamard: bool,
) -> Tensor:
    scale, sums, bias = epilogue
    rows = rotation.rotated(tokens.float()) if hadamard else tokens.float()
    step, zero = token_grid(rows, bits, clip)
    # 9 bits with their sign: 8-bit values are shifted into int8, and the shift is taken back with the weights' sums.
    shift = zero if bits == 4 else 128.0
    values = (rows / step).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(shift).char()
    product = integer_product(values, whole)
    y = product.view(torch.float32).copy_(product)  # in its own memory: fresh pages cost more than the arithmetic
    if bits == 8:
        y.addcmul_(128 - zero, sums)
    y = y.mul_(scale)
    y = y.mul_(step) if bias is None else torch.addcmul(bias, y, step, out=y)
    return y.to(tokens.dtype)


def integer_product(values: Tensor, whole: Tensor) -> Tensor:
    """The exact int32 product of int8 [T, K] and int8 [K, N]."""
    if _int_mm_is_exact_and_fast():
        return torch._int_mm(values, whole)
    # 128 * 128 * 1024 = 2^24: float32 sums of this many terms are exact, whatever the order.
    blocks = zip(values.split(1024, 1), whole.split(1024, 0), strict=True)
    return reduce(Tensor.add_, ((rows.float() @ columns.float()).int() for rows, columns in blocks))


def packed_product(values: Tensor, weight: Tensor, steps: Tensor, n: int) -> Tensor:
    """rows [T, K] times step q by PyTorch's CPU kernel, in float32 [T, N]; rows and sums are rounded to bfloat16.

    Whole numbers up to 256, which quantized rows are, are exact in bfloat16.
    """
    groups, padded = steps.shape
    factors = torch.zeros(groups, padded, 2, dtype=torch.bfloat16)
    factors[..., 0].copy_(steps)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(
        values.bfloat16(), weight.view(padded, -1), values.shape[1] // groups, factors
    )
    return product[:, :n].float()


@cache
def packed_product_is_fast() -> bool:
    """Whether PyTorch has its AVX-512 kernel here, and reads the order of nibbles that files have.

    With AVX2 it packs 32 channels to a block, elsewhere it runs a plain loop.
    """
    if not torch.cpu.get_capabilities().get("avx512_bw", False):
        return False
    values = (torch.arange(64 * 32, dtype=torch.int32) * 7 % 16).view(64, 32)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1).view(1, 32, 32)
    except RuntimeError:  # a build without the operator
        return False
    blocks = values.to(torch.uint8).view(1, 2, 32, 32)
    return torch.equal(packed, (blocks[:, 0] | (blocks[:, 1] << 4)).transpose(1, 2))
