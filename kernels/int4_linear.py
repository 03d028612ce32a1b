"""A linear layer with 4-bit weights in groups and activations of 4 or 8 bits, quantized per token when it runs.

    x'      = x, or x H with the Hadamard matrix H of its width (`hadamard=True`; the weight must be W H then)
    low     = clip min(min_k x'[t, k], 0),   high = clip max(max_k x'[t, k], 0)
    s[t]    = max((high - low) float32(1 / levels), 2^-126)                        levels = 2^bits - 1
    z[t]    = round(-low / s[t]),   u[t, k] = clamp(round(x'[t, k] / s[t]) + z[t], 0, levels) - z[t]
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

Source: dynamic asymmetric per-token activations with a clip ratio, symmetric weights in groups: QuaRot (Ashkboos et al.
2024, arXiv:2404.00456), section 4; whole steps: QServe (Lin et al. 2024, arXiv:2405.04532).
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, reduce
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import hadamard as rotation
from .contract import FLOATS, Argument, Contract, Size, Spec, missing_kernel, register
from .int4_weights import GROUPS, ROWS, unpack
from .int8_linear import _int_mm_is_exact_and_fast

HAS_TRITON = find_spec("triton") is not None
if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    _jit: Callable[..., Any] = triton.jit
    _jit_any_m: Callable[..., Any] = triton.jit(do_not_specialize=["M"])
else:  # no wheel for this platform: the reference and the cpu kernel need none, _cuda says so

    def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    _jit_any_m = _jit

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
_TINY = torch.finfo(torch.float32).tiny
_FEW = 8
"""Tokens up to which PyTorch's product of 4-bit weights beats unpacking: one token of 576 -> 1536 takes 57 us, 16 take
375; unpacking takes 206 and the integer product 70 more (one thread of a Xeon with AMX)."""


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


def quantize_tokens(tokens: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows [T, K] of float32: u = q - z as floats [T, K], the step [T, 1] (NaN for a row with NaN), and z."""
    step, zero = token_grid(tokens, bits, clip)
    values = (tokens / step).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero)
    return values, step, zero


def token_grid(tokens: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """Step and zero point [T, 1] of rows of float32."""
    # Not aminmax: it takes ten times as long as both (430 and 43 us for 512 x 576).
    low = tokens.amin(-1, keepdim=True).clamp_max_(0).mul_(clip)
    high = tokens.amax(-1, keepdim=True).clamp_min_(0).mul_(clip)
    step = (high - low).mul_(1 / (2**bits - 1)).clamp_min_(_TINY)
    nan = float("nan")
    step = step.nan_to_num_(nan, posinf=nan, neginf=nan)
    return step, low.div_(step).neg_().round_()


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
    tokens = x.reshape(-1, x.shape[-1])
    n = len(scale)
    if bias is not None:
        bias = bias.float()
    if len(tokens) <= _FEW and packed_product_is_fast():
        rows = rotation.rotated(tokens.float()) if hadamard else tokens.float()
        values, step, _ = quantize_tokens(rows, bits, clip)
        total = packed_product(values, weight, steps, n).mul_(scale)
        y = total.mul_(step) if bias is None else torch.addcmul(bias, total, step, out=total)
        return y.to(x.dtype).view(*x.shape[:-1], n)
    whole = unpack(weight, steps)
    whole = whole if whole.shape[1] == n else whole[:, :n].contiguous()
    epilogue = (scale, sums.float(), bias)
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
    if not HAS_TRITON:
        raise missing_kernel(CONTRACT.operator, x.device, "triton is not installed (pip install triton)")
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


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch of the GEMM kernel; ``half`` low and ``half`` high channels a tile."""

    block_m: int
    half: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_config(m: int, n: int, group: int) -> Config:
    """Tile sizes for m tokens: small tiles for few, since such products wait for memory, and no tile crosses a group.

    Not tuned on a GPU; they compile without spills for sm_80, sm_89 and sm_90.
    """
    block_k = min(group, 128)
    if m <= 16:
        return Config(16, 32, block_k, 4, 4)
    if m * n <= 1 << 20:
        return Config(64, 32, block_k, 4, 3)
    return Config(128, 64, min(group, 64), 8, 3)


def launch(
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
    """Run the two Triton kernels, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1)."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = tokens.shape, len(scale)
    y = x.new_empty(m, n)
    if m > 0:
        quantized, step, shift = launch_quantize(tokens, bits, clip, hadamard)
        group = k // len(steps)
        config = choose_config(m, n, group)
        grid = (triton.cdiv(m, config.block_m) * triton.cdiv(steps.shape[1], 2 * config.half),)
        _gemm_kernel[grid](
            quantized, step, shift, weight, steps, scale, sums, scale if bias is None else bias.contiguous(), y,
            m, n, k, steps.shape[1],
            HAS_BIAS=bias is not None, GROUP=group,
            BLOCK_M=config.block_m, HALF=config.half, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n)


def launch_quantize(tokens: Tensor, bits: int, clip: float, hadamard: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, K] as int8, their steps float32 [T] and what is to be added to each integer, int32 [T].

    A Hadamard transform is fused where one matrix covers the row and its tile fits; else it is a kernel of its own.
    """
    m, k = tokens.shape
    quantized = torch.empty_like(tokens, dtype=torch.int8)
    step = torch.empty(m, dtype=torch.float32, device=tokens.device)
    shift = torch.empty(m, dtype=torch.int32, device=tokens.device)
    chosen = rotation.split(k)
    fused = hadamard and rotation.orders(k).blocks == 1 and chosen.padded_left * chosen.padded_right <= _LARGEST_TILE
    if hadamard and not fused:
        tokens = rotation.launch(tokens.float())
    left, right = rotation.sides(k, tokens.device) if fused else (tokens, tokens)
    shape = chosen if fused else (1, 1, 1, 1)
    block = triton.next_power_of_2(k)
    _quantize_kernel[(m,)](
        tokens, quantized, step, shift, left, right, k**-0.5, clip, k,
        LEVELS=2**bits - 1, SHIFT=128 if bits == 8 else 0, ROTATE=fused,
        LEFT=shape[0], RIGHT=shape[1], PADDED_LEFT=shape[2], PADDED_RIGHT=shape[3], BLOCK_K=block,
        num_warps=8 if block <= 8192 else 16,
    )  # fmt: skip
    return quantized, step, shift


_LARGEST_TILE = 4096
"""Elements of a row's padded tile that are rotated in registers; beyond, the rotation is a kernel of its own."""


@_jit
def _round(v):
    # Adding and subtracting 1.5 * 2^23 rounds half to even, like torch.round, also in the interpreter (no libdevice).
    return (v + 12582912.0) - 12582912.0


@_jit
def _step_and_zero(low, high, poison, clip, LEVELS: tl.constexpr):
    """Step and zero point of a row with these extremes; the step is NaN where ``poison`` (the sum of v - v) is."""
    low = tl.minimum(low, 0.0) * clip
    high = tl.maximum(high, 0.0) * clip
    step = tl.maximum((high - low) * (1.0 / LEVELS), 1.1754943508222875e-38)
    return step + poison, _round(tl.div_rn(-low, step))


@_jit
def _quantize_kernel(
    x, quantized, token_step, token_shift, left, right, factor, clip, K,
    LEVELS: tl.constexpr, SHIFT: tl.constexpr, ROTATE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED_LEFT: tl.constexpr, PADDED_RIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a token: its rotation if asked for, its extremes, its integers; the row stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    if ROTATE:
        i = tl.arange(0, PADDED_LEFT)
        j = tl.arange(0, PADDED_RIGHT)
        inside = (i < LEFT)[:, None] & (j < RIGHT)[None, :]
        at = i[:, None] * RIGHT + j[None, :]
        tile = tl.load(x + row * K + at, mask=inside, other=0.0).to(tl.float32)
        v = rotation.rotate_tile(tile, left, right, factor, PADDED_LEFT, PADDED_RIGHT)
        low = tl.min(tl.min(v, 1), 0)
        high = tl.max(tl.max(v, 1), 0)
        poison = tl.sum(tl.sum(v - v, 1), 0)
    else:
        at = tl.arange(0, BLOCK_K)
        inside = at < K
        v = tl.load(x + row * K + at, mask=inside, other=0.0).to(tl.float32)
        low = tl.min(v, 0)
        high = tl.max(v, 0)
        poison = tl.sum(v - v, 0)
    step, zero = _step_and_zero(low, high, poison, clip, LEVELS)
    q = tl.minimum(tl.maximum(_round(tl.div_rn(v, step)) + zero, 0.0), LEVELS)
    if SHIFT:
        tl.store(quantized + row * K + at, (q - SHIFT).to(tl.int8), mask=inside)
        tl.store(token_shift + row, (SHIFT - zero).to(tl.int32))
    else:
        tl.store(quantized + row * K + at, (q - zero).to(tl.int8), mask=inside)
        tl.store(token_shift + row, 0)
    tl.store(token_step + row, step)


@_jit_any_m
def _gemm_kernel(
    quantized, token_step, token_shift, weight, steps, scale, sums, bias, y, M, N, K, P,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y a program: HALF channels from the low nibbles, and the HALF that lie 32 further from the high."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(P, 2 * HALF)
    rows = program // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    packed = program % tiles_n * HALF + tl.arange(0, HALF)
    # Padded channels are zeros; tiles past the end wrap around and are not stored.
    low = (packed // 32 * 64 + packed % 32) % P
    high = low + 32
    ks = tl.arange(0, BLOCK_K)
    left = quantized + (rows % M).to(tl.int64)[:, None] * K + ks[None, :]
    right = weight + (low // 64).to(tl.int64)[None, :] * K * 32 + ks[:, None] * 32 + (packed % 32)[None, :]
    total_low = tl.zeros([BLOCK_M, HALF], tl.int32)
    total_high = tl.zeros([BLOCK_M, HALF], tl.int32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(left)
        pair = tl.load(right)
        group = steps + start // GROUP * P
        b = ((pair & 15).to(tl.int8) - 8) * tl.load(group + low)[None, :]
        total_low = tl.dot(a, b, total_low, out_dtype=tl.int32)
        b = ((pair >> 4).to(tl.int8) - 8) * tl.load(group + high)[None, :]
        total_high = tl.dot(a, b, total_high, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K * 32
    step = tl.load(token_step + rows % M)
    shift = tl.load(token_shift + rows % M)
    _store_tile(total_low, step, shift, scale, sums, bias, y, rows, low, packed < P // 2, M, N, HAS_BIAS)
    _store_tile(total_high, step, shift, scale, sums, bias, y, rows, high, packed < P // 2, M, N, HAS_BIAS)


@_jit
def _store_tile(total, step, shift, scale, sums, bias, y, rows, columns, inside, M, N, HAS_BIAS: tl.constexpr):
    inside = inside & (columns < N)
    total += shift[:, None] * tl.load(sums + columns, mask=inside, other=0)[None, :]
    result = total.to(tl.float32) * tl.load(scale + columns, mask=inside, other=0.0)[None, :] * step[:, None]
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    pointers = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(pointers, result.to(y.dtype.element_ty), mask=(rows < M)[:, None] & inside[None, :])


torch.library.impl("graphwright::int4_linear", "cpu", _cpu)
torch.library.impl("graphwright::int4_linear", "cuda", _cuda)
register(torch.ops.graphwright.int4_linear.default, reference, CONTRACT)
