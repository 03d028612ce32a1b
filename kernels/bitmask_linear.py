"""A linear layer whose sparse weight stays compressed: one bit a place, and the values that are not zero.

    y[t, n] = sum over stored k of x[t, k] W[n, k] + bias[n]

Shapes: x ``[..., K]``, bits uint8 ``[N, ceil(K / 8)]``, values ``[nnz]``, starts int64 ``[N + 1]``, bias ``[N]``
(`bitmask_weights.py`). Dtypes: x, values, bias and y alike, float32, float16 or bfloat16.

Few tokens read the compressed weight as it is, on CPUs with AVX-512: one thread of a Sapphire Rapids, 60% zeros, 1536 x
576 out of the cache, took 0.28 ms for one token (dense 0.26) and 0.40 for four (dense 0.54). More tokens, other types
and other processors make the dense weight first, for this call alone: that saves memory and costs the time of writing
it once (0.4 of 4.3 ms at 512 tokens). On CUDA a 2:4 weight in 16 bits is handed to PyTorch's semi-structured kernels,
packed once; any other one is made dense as on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .bitmask_linear_cpu import few_tokens, unpacked
from .bitmask_weights import decompress
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register

CONTRACT = Contract(
    "bitmask_linear",
    {
        "x": Argument("... K", FLOATS),
        "bits": Argument("N W", (torch.uint8,)),
        "values": Argument("Z", FLOATS),
        "starts": Argument("S", (torch.int64,)),
        "bias": Argument("N", FLOATS, optional=True),
    },
    sizes={"K": Size(minimum=1), "N": Size(minimum=1)},
    capability=(8, 0),
)


def reference(x: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """The dense product of the decompressed weight."""
    return F.linear(x, decompress(bits, values, x.shape[-1]), bias)


@torch.library.custom_op("graphwright::bitmask_linear", mutates_args=())
def bitmask_linear(x: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x ``[..., K]`` by a compressed weight ``[N, K]``.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold, or types that differ.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


@bitmask_linear.register_fake
def _fake(x: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    _require(x, bits, values, starts, bias, proved=False)
    return x.new_empty((*x.shape[:-1], bits.shape[0]))


def _cpu(x: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    _require(x, bits, values, starts, bias)
    made = few_tokens(x, bits, values, starts, bias)
    if made is not None:
        return made
    weight = unpacked(bits, values, starts, x.shape[-1])
    return F.linear(x, decompress(bits, values, x.shape[-1]) if weight is None else weight, bias)


def _cuda(x: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    _require(x, bits, values, starts, bias)
    if (reason := CONTRACT.check_device(x.device)) is not None:
        raise missing_kernel(CONTRACT.operator, x.device, reason)
    if values not in _packed:
        weight = decompress(bits, values, x.shape[-1])
        _packed[values] = _semi_structured(weight) if is_two_of_four(weight) else None
    packed = _packed[values]
    return F.linear(x, decompress(bits, values, x.shape[-1]) if packed is None else packed, bias)


_packed: Any = WeakTensorKeyDictionary()
"""Values of a weight -> the same packed for sparse tensor cores, None where it cannot be."""


def is_two_of_four(weight: Tensor) -> bool:
    """Whether sparse tensor cores could multiply a weight [N, K]: 16-bit, multiples of 64, at most 2 of every 4."""
    rows, columns = weight.shape
    if weight.dtype not in (torch.float16, torch.bfloat16) or rows % 64 or columns % 64:
        return False
    return bool(((weight != 0).view(-1, 4).sum(1) <= 2).all())


def _semi_structured(weight: Tensor) -> Tensor:
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(weight)


def _storage_reason(specs: Mapping[str, Any]) -> str | None:
    x, bits, values, starts, bias = specs.values()
    if bits.shape[1] != -(-x.shape[-1] // 8) or starts.shape[0] != bits.shape[0] + 1:
        return f"got bits {list(bits.shape)} and {starts.shape[0]} starts for K={x.shape[-1]}"
    if {values.dtype, x.dtype if bias is None else bias.dtype} != {x.dtype}:
        return f"got x of {x.dtype} and values of {values.dtype}, expected one type"
    return None


_require = CONTRACT.requirement(_storage_reason)

torch.library.impl("graphwright::bitmask_linear", "cpu", _cpu)
torch.library.impl("graphwright::bitmask_linear", "cuda", _cuda)
register(torch.ops.graphwright.bitmask_linear.default, reference, CONTRACT)
