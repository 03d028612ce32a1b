"""Operators that stand in a traced graph for ONNX operators that PyTorch has no twin of.

    graphwright_onnx::matmul_integer(a, b, zero)     MatMulInteger: uint8 [.., K] less its zero by int8 [K, N] to int32
    graphwright_onnx::matmul_integer_to_float(..)    MatMulIntegerToFloat of com.microsoft: the same times a scale [N]
    graphwright_onnx::int8_floats(weight, scale)     DequantizeLinear of int8 [N, K], a scale a row
    graphwright_onnx::int4_values(packed, k, n)      Cast of a 4-bit initializer [K, N] to int8
    graphwright_onnx::int4_floats(packed, scale..)   DequantizeLinear of it, in blocks of rows, to float [K, N]
    graphwright_onnx::matmul_nbits(x, weight, ..)    MatMulNBits of com.microsoft

Each runs in PyTorch too, by its formula, so that a lowered program can be checked before it is translated. 4-bit values
lie as ONNX packs them: two in a byte, the first in the low bits, in the order of the flattened tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "graphwright_onnx"


@torch.library.custom_op(f"{NAMESPACE}::matmul_integer", mutates_args=())
def matmul_integer(a: Tensor, b: Tensor, zero: int) -> Tensor:
    """The exact product of integers, uint8 [..., K] less a zero point by int8 [K, N], as int32 [..., N].

    Runtimes are made for uint8 on the left: with int8 there the CPU's of ONNX Runtime 1.32 was 15 to 49 times slower.
    """
    return ((a.double() - zero) @ b.double()).int()


@matmul_integer.register_fake
def _(a: Tensor, b: Tensor, zero: int) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[1]), dtype=torch.int32)


@torch.library.custom_op(f"{NAMESPACE}::matmul_integer_to_float", mutates_args=())
def matmul_integer_to_float(a: Tensor, b: Tensor, scale: Tensor, zero: int) -> Tensor:
    """`matmul_integer` times a scale float32 [N], as float32 [..., N]: without a pass over the integers."""
    return matmul_integer(a, b, zero).float() * scale


@matmul_integer_to_float.register_fake
def _(a: Tensor, b: Tensor, scale: Tensor, zero: int) -> Tensor:
    return scale.new_empty((*a.shape[:-1], b.shape[1]))


@torch.library.custom_op(f"{NAMESPACE}::int8_floats", mutates_args=())
def int8_floats(weight: Tensor, scale: Tensor) -> Tensor:
    """8-bit integers [N, K] times the scale [N] of their row, in the scale's dtype."""
    return weight.to(scale.dtype) * scale[:, None]


@int8_floats.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(weight.shape)


@torch.library.custom_op(f"{NAMESPACE}::int4_values", mutates_args=())
def int4_values(packed: Tensor, k: int, n: int) -> Tensor:
    """4-bit integers, uint8 [ceil(K N / 2)], as int8 [K, N]."""
    return unpack_int4(packed, k, n)


@int4_values.register_fake
def _(packed: Tensor, k: int, n: int) -> Tensor:
    return packed.new_empty((k, n), dtype=torch.int8)


@torch.library.custom_op(f"{NAMESPACE}::int4_floats", mutates_args=())
def int4_floats(packed: Tensor, scale: Tensor, k: int, n: int) -> Tensor:
    """4-bit integers [K, N] times the scale [K / g, N] of their block of g rows, in the scale's dtype."""
    blocks = unpack_int4(packed, k, n).view(scale.shape[0], -1, n)
    return (blocks * scale[:, None]).view(k, n)


@int4_floats.register_fake
def _(packed: Tensor, scale: Tensor, k: int, n: int) -> Tensor:
    return scale.new_empty((k, n))


@torch.library.custom_op(f"{NAMESPACE}::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, block: int, k: int, n: int, accuracy: int
) -> Tensor:
    """x [..., K] by a weight in blocks of K to [..., N].

    Args:
        x: float [..., K].
        weight: uint8 [N, K / block, block bits / 8], 2^(bits - 1) added to each value.
        scale: x's dtype, [N, K / block].
        bias: x's dtype, [N], or None.
        bits: 4 or 8.
        block: Channels of a block.
        k: K.
        n: N.
        accuracy: 0 for the float product, 4 to let activations be rounded to 8 bits in blocks.
    """
    nibbles = torch.stack((weight & 15, weight >> 4), -1).flatten(-2) if bits == 4 else weight
    values = (nibbles.to(x.dtype) - 2 ** (bits - 1)) * scale.view(n, -1, 1)
    return torch.nn.functional.linear(x, values.reshape(n, -1)[:, :k], bias)


@matmul_nbits.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, block: int, k: int, n: int, accuracy: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def pack_int4(values: Tensor) -> Tensor:
    """Integers -8..7 of any shape as bytes, uint8 [ceil(numel / 2)]."""
    flat = values.flatten().to(torch.uint8) & 15
    flat = torch.nn.functional.pad(flat, (0, len(flat) % 2))
    return flat[::2] | (flat[1::2] << 4)


def unpack_int4(packed: Tensor, k: int, n: int) -> Tensor:
    """The inverse of `pack_int4`, int8 [K, N]."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten()[: k * n].to(torch.int8)
    return ((nibbles ^ 8) - 8).view(k, n)
