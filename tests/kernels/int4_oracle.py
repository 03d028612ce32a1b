"""int4_linear's exact answer, and how far rounding may take a kernel from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphwright.kernels import int4_linear_cpu
from graphwright.kernels.int4_weights import Int4, quantize_groups, unpack
from graphwright.kernels.token_grid import quantize_tokens


def make_int4_case(
    tokens: int,
    k: int,
    n: int,
    *,
    group: int = 32,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    seed: int = 0,
) -> tuple[Tensor | None, ...]:
    """x ``[tokens, k]`` that is not symmetric, a packed weight ``[n, k]`` and, if asked for, a bias ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, k, generator=generator) * 3 + 1).to(dtype)
    weight = quantize_groups(torch.randn(n, k, generator=generator) * 0.05, group)
    return (x, *weight, torch.randn(n, generator=generator).to(dtype) if bias else None)


def assert_close_to_exact(y: Tensor, case: tuple, bits: int, clip: float, few: bool = False) -> None:
    """Assert that ``y`` is the exact product of the quantized operands up to the rounding of the epilogue.

    The quantized tokens are the formula's in float32. The epilogue rounds six times: the sum, its correction, two
    products, the bias. With 8 bits the sum is split in two that may cancel, of up to 383 levels times the weights' sum.
    ``few``: the sum may have been rounded to bfloat16.
    """
    x, packed, steps, scale, sums, bias = case
    values, step, zero = quantize_tokens(x.float(), bits, clip)
    whole = unpack(packed, steps)[:, : len(scale)].double()
    product = values.double() @ whole
    split = (128 - zero.double()).abs() * sums.double().abs() if bits == 8 else torch.zeros(())
    factor = scale.double() * step.double()
    offset = torch.zeros(()) if bias is None else bias
    exact = product * factor + offset.double()
    half_ulp = torch.finfo(torch.float32).eps / 2
    info = torch.finfo(x.dtype)
    bound = 6 * half_ulp * ((product.abs() + 2 * split) * factor + offset.double().abs()) + info.eps / 2 * exact.abs()
    if few:
        bound = bound + 2.0**-8 * product.abs() * factor
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound * 1.001 + info.tiny * info.eps).all()


def launch(*case: Any) -> Tensor:
    """The Triton kernel on the operator's arguments; for `interpreter.Call`, which carries plain tensors."""
    from graphwright.kernels.int4_linear_triton import launch

    x, packed, steps, scale, sums, *rest = case
    return launch(x, Int4(packed, steps, scale, sums), *rest)


def compute(*case: Any) -> Tensor:
    """The CPU kernel on the operator's arguments, as `launch`."""
    x, packed, steps, scale, sums, *rest = case
    return int4_linear_cpu.compute(x, Int4(packed, steps, scale, sums), *rest)
