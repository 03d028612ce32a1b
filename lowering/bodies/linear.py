"""Traceable bodies of linears whose references read bits or sort: the same numbers by comparing and counting."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


def nm_sparsify_body(x: Tensor, factors: Tensor | None, n: int, m: int) -> Tensor:
    """`nm_sparsify`: a channel stays if fewer than n of its m have a higher score, or an equal one before it."""
    scores = x.float().abs() if factors is None else x.float().abs() * factors
    # The operator orders by bits, where NaN is above infinity; it is so here, but that they count as equal.
    scores = torch.where(scores.isnan(), float("inf"), scores).unflatten(-1, (-1, m))
    mine, other = scores[..., :, None], scores[..., None, :]
    places = torch.arange(m, device=x.device)
    earlier = places[None, :] < places[:, None]
    above = ((other > mine) | ((other == mine) & earlier)).sum(-1)
    return torch.where((above < n).flatten(-2), x, 0.0)


def nm_linear_body(x: Tensor, factors: Tensor | None, weight: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """`nm_linear`: the dense product of the selected channels."""
    return F.linear(nm_sparsify_body(x, factors, n, m), weight, bias)


def bitmask_linear_body(x: Tensor, bits: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """`bitmask_linear`: each kept weight is found by counting the bits before it."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    kept = ((bits[:, :, None] >> places) & 1).int().flatten(1)[:, : x.shape[-1]]
    index = starts[:-1, None] + kept.cumsum(1) - 1
    weight = torch.where(kept > 0, values[index.clamp(min=0)], 0.0)
    return F.linear(x, weight.to(x.dtype), bias)


def fake_quantize_body(x: Tensor, bits: int, group: int, clip: float = 1.0) -> Tensor:
    """`fake_quantize`: rounded to the grid of each group, and back."""
    rows = x.float().unflatten(-1, (-1, group))
    values, step, zero = on_grid(rows, bits, clip)
    return ((values - zero) * step).flatten(-2).to(x.dtype)


def on_grid(tokens: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Integers as floats with their zero added, steps and zeros [.., 1], as `kernels/token_grid.py` has them."""
    low = tokens.amin(-1, keepdim=True).clamp_max(0) * clip
    high = tokens.amax(-1, keepdim=True).clamp_min(0) * clip
    step = ((high - low) * (1 / (2**bits - 1))).clamp_min(_TINY)
    # Infinity minus itself is NaN: a row that holds one is NaN as a whole, as the operators have it.
    step = step + (step - step)
    zero = (-(low / step)).round()
    return ((tokens / step).round() + zero).clamp(0, 2**bits - 1), step, zero


def int4_unpacked(packed: Tensor, steps: Tensor, n: int) -> Tensor:
    """step q as int8 [K, N] of a packed weight (`kernels/int4_weights.py`), by operators on bytes."""
    blocks, k, half = packed.shape
    # [B, K, 32] to [K, B, 2, 32]: a block's first 32 channels are in the low bits.
    low, high = packed & 15, packed >> 4
    q = torch.stack((low, high), 2).permute(1, 0, 2, 3).reshape(k, blocks * 2 * half).to(torch.int32) - 8
    by_group = q.view(steps.shape[0], -1, blocks * 2 * half) * steps[:, None].to(torch.int32)
    return by_group.view(k, -1)[:, :n].to(torch.int8)


def int4_weight_linear_body(
    x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`int4_weight_linear`, the weight unpacked when it runs."""
    y = (x.float() @ int4_unpacked(weight, steps, scale.shape[0]).float()) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def int8_linear_body(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`int8_linear` in float operators: exact up to K = 1040, as the reference."""
    tokens, step = rounded_tokens(x)
    y = F.linear(tokens, weight.float()) * scale * step
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens rounded to 8 bits, as whole float32 [..., K], and their steps [..., 1]."""
    tokens = x.float()
    step = (tokens.abs().amax(-1, keepdim=True) * (1 / 127)).clamp_min(_TINY)
    # A token with an infinity is all NaN, as the operator has it: its step says so.
    return (tokens / step).round(), step + (step - step)


def nm_int8_linear_body(
    x: Tensor, factors: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """`nm_int8_linear` in float operators."""
    return int8_linear_body(nm_sparsify_body(x, factors, n, m), weight, scale, bias)


def int4_linear_with(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A body of `int4_linear`, the weight unpacked when it runs, without the rotation.

    Args:
        product: Of tokens [..., K], whole numbers as float32, and a weight int8 [K, N].
    """

    def body(
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
        values, step, zero = on_grid(x.float(), bits, clip)
        total = product(values, int4_unpacked(weight, steps, scale.shape[0]))
        return scaled(total, zero, sums, scale, step, bias, x.dtype)

    return body


def scaled(
    total: Tensor, zero: Tensor, sums: Tensor, scale: Tensor, step: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The result of an integer product [..., N]: zeros taken off by the weight's sums, scales and bias."""
    y = (total.float() - zero * sums.float()) * scale * step
    return (y if bias is None else y + bias.float()).to(dtype)


int4_linear_body = int4_linear_with(lambda values, weight: values @ weight.float())
"""In float operators."""
