"""Linear layers of an 8B decoder in bfloat16: int8, 4-bit weights, rotation and selection fused with rounding, 2:4."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.benchmarks.on_gpu.measure import Case, Goal, Run, relative_error, sets_for
from graphwright.kernels.hadamard import matrix
from graphwright.kernels.int4_weight_linear import int4_weight_linear
from graphwright.kernels.int4_weight_linear import reference as int4_weight_reference
from graphwright.kernels.int4_weights import Int4, quantize_groups
from graphwright.kernels.int8_linear import int8_linear, quantize_per_channel
from graphwright.kernels.int8_linear import reference as int8_reference
from graphwright.kernels.nm_linear import nm_linear
from graphwright.kernels.nm_sparsify import reference as select
from graphwright.kernels.token_grid import quantize_tokens

LAYERS = ((4096, 4096), (4096, 14336))
"""Inputs and outputs of Llama-3.1-8B's square projections and of its gate and up."""
GROUP = 128


def int8() -> Iterator[Case]:
    """Dynamic W8A8 against bfloat16, torch's product of int8 with the same rounding around it, and torchao."""
    for layer in LAYERS:
        for tokens in (1, 16, 512, 4096):
            yield _int8_case(*layer, tokens)


def _int8_case(inputs: int, outputs: int, tokens: int) -> Case:
    many = sets_for(inputs * outputs)
    weights = [_weight(inputs, outputs, seed) for seed in range(many)]
    packed = [quantize_per_channel(weight) for weight in weights]
    x = _tokens(tokens, inputs, many)
    candidates: dict[str, Run] = {
        "int8_linear": lambda i: int8_linear(x[i], *packed[i]),
        "bf16": lambda i: F.linear(x[i], weights[i]),
    }
    if tokens > 16:  # torch's product of int8 takes no fewer, and torchao calls it
        candidates["torch._int_mm"] = lambda i: _int_mm_linear(x[i], *packed[i])
        if find_spec("torchao") is not None:
            candidates["torchao"] = _torchao(weights, x)
    return Case(
        "int8_linear",
        f"{inputs} -> {outputs}, {tokens} tokens",
        candidates,
        check=lambda y: relative_error(y, int8_reference(x[0], *packed[0])),
        moved=inputs * outputs + 2 * tokens * (inputs + outputs),
        operations=2 * tokens * inputs * outputs,
        rate="int8",
        goals=(Goal("bf16", {1: 1.5, 16: 1.5, 4096: 1.3}.get(tokens, 1.0)),),
        sets=many,
    )


def int4() -> Iterator[Case]:
    """W4A16 against bfloat16 and PyTorch's own product of 4-bit weights (tinygemm)."""
    for layer in LAYERS:
        for tokens in (1, 16, 64, 512):
            yield _int4_case(*layer, tokens)


def _int4_case(inputs: int, outputs: int, tokens: int) -> Case:
    many = sets_for(inputs * outputs // 2)
    weights = [_weight(inputs, outputs, seed) for seed in range(many)]
    first = quantize_groups(weights[0], GROUP)
    packed = [first, *(Int4(*(part.clone() for part in first)) for _ in weights[1:])]
    x = _tokens(tokens, inputs, many)
    few = (Goal("bf16", 2.0), Goal("tinygemm", 1.0))
    return Case(
        "int4_weight_linear",
        f"{inputs} -> {outputs}, {tokens} tokens",
        {
            "int4_weight_linear": lambda i: int4_weight_linear(x[i], *packed[i][:3]),
            "bf16": lambda i: F.linear(x[i], weights[i]),
            "tinygemm": _tinygemm(outputs, inputs, x),
        },
        check=lambda y: relative_error(y, int4_weight_reference(x[0], *packed[0][:3])),
        moved=inputs * outputs * (GROUP // 2 + 1) // GROUP + 2 * tokens * (inputs + outputs),
        operations=2 * tokens * inputs * outputs,
        goals=few if tokens <= 16 else (Goal("bf16", 1.0),),
        sets=many,
    )


def fused() -> Iterator[Case]:
    """Rotation and rounding, selection and rounding, selection alone: each in one pass over its rows?"""
    for channels in (4096, 14336):
        x = _tokens(16384, channels, 2)
        yield _rotation_case(x)
        for pattern in ((8, 16), (2, 4)):
            yield from _selection_cases(x, *pattern)


def _rotation_case(x: Tensor) -> Case:
    from graphwright.kernels.hadamard import tile_fits
    from graphwright.kernels.token_grid_triton import launch_quantize

    tokens, channels = x.shape[1:]
    one = tile_fits(channels, 2)
    return Case(
        "hadamard and quantize" + ("" if one else " (not fused)"),
        f"{tokens} tokens of {channels}",
        {"fused": lambda i: launch_quantize(x[i], 4, 1.0, True)},
        check=lambda y: _rotation_error(y, x[0]),
        tolerance=2e-3,
        moved=tokens * channels * 3,
        goals=(Goal("floor", 0.7),),
        sets=len(x),
    )


def _selection_cases(x: Tensor, n: int, m: int) -> Iterator[Case]:
    from graphwright.kernels.nm_int8_linear_triton import launch_selection
    from graphwright.kernels.nm_sparsify_triton import launch as launch_sparsify

    tokens, channels = x.shape[1:]
    factors = torch.rand(channels, device="cuda") + 0.5
    yield Case(
        f"select {n}:{m} and quantize",
        f"{tokens} tokens of {channels}",
        {"fused": lambda i: launch_selection(x[i], factors, n, m)},
        check=lambda y: _selection_error(y, x[0], factors, n, m),
        moved=tokens * channels * 3,
        goals=(Goal("floor", 0.7),),
        sets=len(x),
    )
    yield Case(
        f"select {n}:{m}",
        f"{tokens} tokens of {channels}",
        {"nm_sparsify": lambda i: launch_sparsify(x[i], factors, n, m)},
        check=lambda y: float((y != select(x[0], factors, n, m)).sum()),
        tolerance=0.0,
        moved=tokens * channels * 4,
        goals=(Goal("floor", 0.7),),
        sets=len(x),
    )


def two_of_four() -> Iterator[Case]:
    """2:4 activations on sparse tensor cores against dense bfloat16 and dense float8."""
    for layer in LAYERS:
        for tokens in (512, 4096):
            yield _two_of_four_case(*layer, tokens)


def _two_of_four_case(inputs: int, outputs: int, tokens: int) -> Case:
    weight = _weight(inputs, outputs, 0)
    x = _tokens(tokens, inputs, 4)
    return Case(
        "nm_linear 2:4",
        f"{inputs} -> {outputs}, {tokens} tokens",
        {
            "nm_linear": lambda i: nm_linear(x[i], None, weight, None, 2, 4),
            "bf16": lambda i: F.linear(x[i], weight),
            "float8": _float8(weight, x),
        },
        check=lambda y: relative_error(y, select(x[0], None, 2, 4).double() @ weight.double().T),
        moved=2 * (inputs * outputs + tokens * (inputs + outputs)),
        operations=tokens * inputs * outputs,
        goals=(Goal("bf16", 1.0),),
        sets=len(x),
    )


def _weight(inputs: int, outputs: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    made = torch.randn(outputs, inputs, generator=generator, device="cuda") * inputs**-0.5
    return made.bfloat16()


def _tokens(tokens: int, channels: int, many: int) -> Tensor:
    return torch.randn(many, tokens, channels, device="cuda", dtype=torch.bfloat16)


def _int_mm_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    step = x.float().abs().amax(-1, keepdim=True) / 127
    whole = (x / step).round().to(torch.int8)
    return (torch.ops.aten._int_mm(whole, weight.T) * (step * scale)).to(x.dtype)


def _torchao(weights: list[Tensor], x: Tensor) -> Callable[[int], Any]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = []
    for weight in weights:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cuda", dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        quantized.append(layer.weight)
    # One compiled function for all input sets; those of the last case are not kept.
    torch.compiler.reset()
    compiled = torch.compile(lambda x, weight: F.linear(x, weight), dynamic=False)
    return lambda i: compiled(x[i], quantized[i])


def _tinygemm(outputs: int, inputs: int, x: Tensor) -> Callable[[int], Tensor]:
    sets = []
    for _ in range(len(x)):
        # Only its time is asked for: random codes, steps of one.
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        steps = torch.ones(inputs // GROUP, outputs, 2, dtype=torch.bfloat16, device="cuda")
        sets.append((torch.ops.aten._convert_weight_to_int4pack(codes, 8), steps))
    return lambda i: torch.ops.aten._weight_int4pack_mm(x[i], sets[i][0], GROUP, sets[i][1])


def _float8(weight: Tensor, x: Tensor) -> Callable[[int], Tensor]:
    kind = torch.float8_e4m3fn
    one = torch.ones((), device="cuda")
    narrow = weight.to(kind)

    def run(i: int) -> Tensor:
        step = x[i].abs().amax().float() / 448
        return torch.ops.aten._scaled_mm((x[i] / step).to(kind), narrow.T, step, one, out_dtype=x.dtype)

    return run


def _rotation_error(made: tuple[Tensor, Tensor, Tensor], x: Tensor) -> float:
    """Of the mean absolute error of rounding: as large as where the exact rotation is rounded."""
    rows = slice(0, 256)
    whole, step, _ = made
    exact = x[rows].double() @ matrix(x.shape[1]).to(x.device)
    found = (whole[rows].double() * step[rows, None].double() - exact).abs().mean()
    integers, steps, _ = quantize_tokens(exact.float().cpu(), 4, 1.0)
    best = (integers.double() * steps.double().view(-1, 1) - exact.cpu()).abs().mean()
    return abs(float(found.cpu() / best) - 1)


def _selection_error(made: tuple[Tensor, Tensor], x: Tensor, factors: Tensor, n: int, m: int) -> float:
    whole, step = made
    wanted = select(x, factors, n, m).float()
    return float(((whole.float() * step[:, None] - wanted).abs() / step[:, None]).max() > 0.501)
