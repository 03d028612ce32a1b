"""Scaled dot-product attention that also gives the logarithm of each query's sum, which it computes on the way.

    s[i, j]         = scale * sum_d query[b, h, i, d] key[b, g, j, d],      scale 1 / sqrt(D) if unset
    lse[b, h, i]    = log sum_j exp(s[i, j])
    output[b, h, i] = sum_j exp(s[i, j] - lse[i]) value[b, g, j]            with the key head g = h // (H / G)

    query       [B, H, N, D]    float32, float16 or bfloat16
    key, value  [B, G, M, D]    query's dtype; G divides H
    output      [B, H, N, D]    query's dtype
    lse         float32 [B, H, N]

It is aten's own fused attention, called by the name under which it also returns the sums: on the CPU the output has the
same bits as `scaled_dot_product_attention`. On CUDA it is FlashAttention for 16 bits and the memory-efficient kernel
for float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register

CONTRACT = Contract(
    "attention_lse",
    {
        "query": Argument("B H N D", FLOATS),
        "key": Argument("B G M D", FLOATS),
        "value": Argument("B G M D", FLOATS),
    },
    # 256 channels are the most that FlashAttention takes.
    sizes={"D": Size(minimum=1, maximum=256), "M": Size(minimum=1), "G": Size(minimum=1), "H": Size(multiple_of="G")},
    capability=(8, 0),
)


def reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The formula in float32 operators (float64 for float64); it stores the score maps."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    k, v = (t.to(dtype).repeat_interleave(group, 1) for t in (key, value))
    scores = query.to(dtype) @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).to(query.dtype), scores.logsumexp(-1)


@torch.library.custom_op("graphwright::attention_lse", mutates_args=())
def attention_lse(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention and the logarithms of its sums; shapes and dtypes as in the module.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


@attention_lse.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    _require(query, key, value, proved=False)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _cpu(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    _require(query, key, value)
    if not query.numel():
        return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    k, v = _repeated(query, key, value)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, k, v, scale=scale)
    return output.contiguous(), lse.contiguous()


def _cuda(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    _require(query, key, value)
    if (reason := CONTRACT.check_device(query.device)) is not None:
        raise missing_kernel(CONTRACT.operator, query.device, reason)
    if not query.numel():
        return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    k, v = _repeated(query, key, value)
    if query.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        output, lse, *_ = efficient(query, k, v, None, True, scale=scale)
    else:
        # It wants channels by eights: zeros add nothing to a product.
        missing = -query.shape[-1] % 8
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (torch.nn.functional.pad(t, (0, missing)) for t in (query, k, v)) if missing else (query, k, v)
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        output = output[..., : query.shape[-1]]
    # Both kernels may fill the sums up to a multiple of some tile.
    return output.contiguous(), lse[..., : query.shape[2]].float().contiguous()


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    return (key, value) if group == 1 else (key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))


def _require(query: Tensor, key: Tensor, value: Tensor, *, proved: bool = True) -> None:
    CONTRACT.require(query=query, key=key, value=value, proved=proved)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise InvalidArgument(
                f"{CONTRACT.operator}: got {name} of {tensor.dtype}, expected {query.dtype} as query has"
            )


torch.library.impl("graphwright::attention_lse", "cpu", _cpu)
torch.library.impl("graphwright::attention_lse", "cuda", _cuda)
register(torch.ops.graphwright.attention_lse.default, reference, CONTRACT)
