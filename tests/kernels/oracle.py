"""int8_linear's exact answer, and how far float32 rounding may take a kernel from it."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.kernels.int8_linear import quantize_per_channel


def make_case(
    tokens: int,
    k: int,
    n: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    magnitude: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """x ``[tokens, k]`` of that magnitude, int8 weight ``[n, k]``, scale ``[n]`` and, if asked for, bias ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, k, generator=generator) * magnitude).to(dtype)
    weight, scale = quantize_per_channel(torch.randn(n, k, generator=generator) * 1e-3)
    return (x, weight, scale, torch.randn(n, generator=generator).to(dtype)) if bias else (x, weight, scale)


def assert_within_rounding(y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Assert that ``y`` is the exact int8 product up to the rounding of the epilogue and of its dtype.

    The quantized tokens are those of the formula in float32 (its one division and one rounding are exact in every
    kernel), the sum is exact in float64, and the epilogue rounds four times: the sum, two products, the bias. A float32
    sum of K > 1040 terms, as in the reference, adds K roundings of the sum of magnitudes; K <= 300 in its test.
    """
    tokens = x.float()
    step = (tokens.abs().amax(-1, keepdim=True) * (1 / 127)).clamp_min(torch.finfo(torch.float32).tiny)
    product = (tokens / step).round().double() @ weight.double().T * scale.double() * step.double()
    offset = torch.zeros(()) if bias is None else bias
    exact = product + offset.double()
    half_ulp = torch.finfo(torch.float32).eps / 2
    info = torch.finfo(x.dtype)
    bound = 4 * half_ulp * (product.abs() + offset.double().abs()) + info.eps / 2 * exact.abs()
    subnormal = info.tiny * info.eps  # the spacing of y near zero, where it has no relative precision
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound * 1.001 + subnormal).all(), float(
        ((y.double() - exact).abs() / bound).max()
    )
