"""Rotation of the last dimension by a Hadamard matrix: spreads outliers over all channels, at the cost of a few sums.

    y[..., j] = sum_i x[..., i] H[i, j]                       H = matrix(n), H H^T = I, entries +-1 / sqrt(n)

Shapes: x ``[..., n]`` to y ``[..., n]``. Dtypes: float64, float32, float16 or bfloat16; 16-bit types are summed in
float32.

Orders: a Kronecker product of factors, each of which is Sylvester's (powers of two) or one of Paley's (p + 1 for a
prime p = 3 mod 4, 2 (p + 1) for p = 1 mod 4): 576 = 4 * 12 * 12, 1536 = 8 * 12 * 16. An order that these do not make is
rotated in equal blocks of the largest divisor that they do make (`Orders.blocks` > 1): still orthogonal, but outliers
spread within a block only. Paley's matrices of the first kind are not symmetric: activations and weights must be
multiplied by the same H, never one of them by its transpose.

Error: every factor of order m adds m terms, so at most sum(factors) roundings of the row's norm.

Source: Paley 1933, "On orthogonal matrices", J. Math. and Phys. 12; online rotations before a quantizer: QuaRot
(Ashkboos et al. 2024, arXiv:2404.00456), section 3, and SpinQuant (Liu et al. 2024, arXiv:2405.16406), R3 and R4.
"""

# ruff: noqa: ANN001, ANN202 (the arguments of Triton kernels are pointers and scalars that Triton types itself)
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from math import isqrt, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register

HAS_TRITON = find_spec("triton") is not None
if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    _jit: Callable[..., Any] = triton.jit
else:  # no wheel for this platform: the reference and the cpu kernel need none, _cuda says so

    def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


CONTRACT = Contract(
    "hadamard", {"x": Argument("... N", (*FLOATS, torch.float64))}, sizes={"N": Size(minimum=1)}, capability=(8, 0)
)


class Orders(NamedTuple):
    """How a size is rotated: ``blocks`` equal parts, each by the Kronecker product of ``factors``."""

    blocks: int
    factors: tuple[int, ...]

    def __str__(self) -> str:
        product = " x ".join(f"H{order}" for order in self.factors) or "H1"
        return product if self.blocks == 1 else f"{self.blocks} blocks of {product}"


@lru_cache(maxsize=256)
def orders(n: int) -> Orders:
    """The rotation of size ``n``: whole where Hadamard matrices are known here, else in the largest blocks that are.

    Raises:
        InvalidArgument: ``n`` is not positive.
    """
    if n < 1:
        raise InvalidArgument(f"got a rotation of {n} channels, expected at least 1")
    for block in sorted((d for d in range(1, n + 1) if n % d == 0), reverse=True):
        factors = _factors(block)
        if factors is not None:
            return Orders(n // block, factors)
    raise AssertionError("1 is an order")


@lru_cache(maxsize=256)
def matrix(n: int) -> Tensor:
    """The rotation ``[n, n]`` as float64; block-diagonal where ``orders(n).blocks`` is not 1. Not to be written."""
    blocks, factors = orders(n)
    product = torch.ones(1, 1, dtype=torch.float64)
    for order in factors:
        product = torch.kron(product, signs(order).double())
    product /= len(product) ** 0.5
    return torch.block_diag(*[product] * blocks) if blocks > 1 else product


@lru_cache(maxsize=64)
def signs(order: int) -> Tensor:
    """The Hadamard matrix of one factor, int8 of +-1; not to be written.

    Raises:
        InvalidArgument: Neither a power of two nor an order of Paley's over a prime.
    """
    if order & (order - 1) == 0 and order > 0:
        result = torch.ones(1, 1, dtype=torch.int8)
        while len(result) < order:
            result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)])
        return result
    if order % 4 == 0 and _is_prime(order - 1):
        return _paley_first(order - 1)
    half = order // 2
    if order % 4 == 0 and half % 2 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        return _paley_second(half - 1)
    raise InvalidArgument(f"no Hadamard matrix of order {order} is known here; orders({order}) makes blocks of it")


def reference(x: Tensor) -> Tensor:
    """The formula: one product with the dense matrix, in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide @ matrix(x.shape[-1]).to(wide.device, wide.dtype)).to(x.dtype)


@torch.library.custom_op("graphwright::hadamard", mutates_args=())
def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension: x ``[..., n]`` to ``[..., n]``.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold.
        MissingKernel: No kernel for x's device.
    """
    raise missing_kernel(CONTRACT.operator, x.device)


@hadamard.register_fake
def _fake(x: Tensor) -> Tensor:
    CONTRACT.require(x=x, proved=False)
    return x.new_empty(x.shape)


def _cpu(x: Tensor) -> Tensor:
    CONTRACT.require(x=x)
    wide = x if x.dtype == torch.float64 else x.float()
    y = rotated(wide.reshape(-1, x.shape[-1])).view(x.shape).to(x.dtype)
    return y.clone() if y.data_ptr() == x.data_ptr() else y


def rotated(rows: Tensor) -> Tensor:
    """Rows ``[T, n]`` of float32 or float64 times ``matrix(n)``, factor by factor.

    A factor is applied as a small dense product along its axis, powers of two as well: each pass of butterflies goes
    over memory once for one addition. 512 tokens of 1536 on one thread of a Xeon with AVX-512: this 0.9 ms, seven
    passes of butterflies for the 128 of 12 * 128 alone 6.5 ms, the dense product 13.3 ms; the linear that follows 5.0.
    """
    n = rows.shape[-1]
    blocks, factors = orders(n)
    y = rows.contiguous()
    trailing = n // blocks
    for order in factors:
        trailing //= order
        h = _scaled(order, y.dtype, y.device)
        y = y.view(-1, order) @ h if trailing == 1 else h.t() @ y.view(-1, order, trailing)
    return y.reshape(rows.shape)


@lru_cache(maxsize=64)
def _scaled(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (signs(order).double() / order**0.5).to(device, dtype)


def _cuda(x: Tensor) -> Tensor:
    with CONTRACT.on_cuda(x.device):
        CONTRACT.require(x=x)
        if x.dtype == torch.float64:
            return reference(x)
        return launch(x)


@lru_cache(maxsize=256)
def _factors(n: int) -> tuple[int, ...] | None:
    """Orders whose product is ``n``, the largest last, with the least sum; None where there are none."""
    power = n & -n
    odd = n // power
    best: tuple[int, ...] | None = None
    if odd == 1:
        return _powers(n)
    for order in range(4, min(n, _LARGEST) + 1, 4):
        if order & (order - 1) == 0 or n % order or not _is_paley(order):
            continue
        rest = _factors(n // order)
        if rest is not None and (best is None or order + sum(rest) < sum(best)):
            best = tuple(sorted((order, *rest)))
    return best


def _powers(n: int) -> tuple[int, ...]:
    """A power of two as factors of at most 64, as equal as can be: (16, 16) for 256; () for 1."""
    exponent = n.bit_length() - 1
    parts = -(-exponent // 6)
    return tuple(sorted(1 << (exponent // parts + (part < exponent % parts)) for part in range(parts)))


_LARGEST = 512
"""Paley factors are applied as dense products; larger ones would cost more than the linear that they precede."""


def _is_paley(order: int) -> bool:
    half = order // 2
    return order % 4 == 0 and (_is_prime(order - 1) or (half % 2 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1)))


def _paley_first(p: int) -> Tensor:
    """H = I + S of order p + 1, with S skew: S = [[0, 1], [-1, Q]], Q[i, j] the Legendre symbol of i - j mod p."""
    result = torch.ones(p + 1, p + 1, dtype=torch.int8)
    result[1:, 0] = -1
    result[1:, 1:] = _jacobsthal(p)
    result[1:, 1:] += torch.eye(p, dtype=torch.int8)
    return result


def _paley_second(p: int) -> Tensor:
    """Order 2 (p + 1), symmetric: entries of [[0, 1], [1, Q]] become 2 x 2 blocks, its zeros [[1, -1], [-1, -1]]."""
    conference = torch.ones(p + 1, p + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(p)
    zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    other = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    return torch.kron(conference, other) + torch.kron(torch.eye(p + 1, dtype=torch.int8), zero)


def _jacobsthal(p: int) -> Tensor:
    symbol = torch.full((p,), -1, dtype=torch.int8)
    symbol[torch.arange(p, dtype=torch.int64) ** 2 % p] = 1
    symbol[0] = 0
    at = torch.arange(p)
    return symbol[(at[:, None] - at[None, :]) % p]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))


class Split(NamedTuple):
    """H as a product of two dense matrices of +-1 for one program: rows ``[left, right]``, padded to powers of two."""

    left: int
    right: int
    padded_left: int
    padded_right: int


def split(n: int) -> Split:
    """The split of a whole order with the least padded tile, sides at least 16 as `tl.dot` wants."""
    factors = _pieces(n)
    sizes = [prod(factors[:cut]) for cut in range(len(factors) + 1)]
    whole = prod(factors)

    def padded(size: int) -> int:
        return max(16, 1 << (size - 1).bit_length())

    candidates = [Split(left, whole // left, padded(left), padded(whole // left)) for left in sizes]
    return min(candidates, key=lambda s: s.padded_left * s.padded_right * (s.padded_left + s.padded_right))


def _pieces(n: int) -> list[int]:
    """The factors of a whole order, powers of two as twos: Sylvester's matrices are products of themselves."""
    pieces = []
    for order in orders(n).factors:
        pieces += [2] * (order.bit_length() - 1) if order & (order - 1) == 0 else [order]
    return pieces


@lru_cache(maxsize=64)
def sides(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two matrices of ``split(n)``, int8 of +-1, zero where padded; not to be written."""
    chosen = split(n)
    factors = _pieces(n)
    found = []
    count = 0
    for size, padded in ((chosen.left, chosen.padded_left), (chosen.right, chosen.padded_right)):
        product = torch.ones(1, 1, dtype=torch.int8)
        while len(product) < size:
            product = torch.kron(product, signs(factors[count]))
            count += 1
        full = torch.zeros(padded, padded, dtype=torch.int8)
        full[:size, :size] = product
        found.append(full.to(device))
    return found[0], found[1]


def tile_fits(n: int, item_size: int) -> bool:
    """Whether a row of a whole order is rotated in one program: its padded tile stays in registers."""
    chosen = split(n)
    return chosen.padded_left * chosen.padded_right <= (8192 if item_size == 2 else 4096)


def launch(x: Tensor) -> Tensor:
    """Run the Triton kernel, arguments unchecked, on x's device (the CPU under TRITON_INTERPRET=1).

    Rows that are too long for it are rotated factor by factor, in PyTorch's own products.
    """
    n = x.shape[-1]
    size = n // orders(n).blocks
    if not tile_fits(size, x.element_size()):
        return rotated(x.float().reshape(-1, n)).view(x.shape).to(x.dtype)
    rows = x.reshape(-1, size).contiguous()
    y = torch.empty_like(rows)
    if len(rows):
        chosen = split(size)
        left, right = sides(size, x.device)
        _hadamard_kernel[(triton.cdiv(len(rows), ROWS),)](
            rows, y, left, right, size**-0.5, len(rows),
            LEFT=chosen.left, RIGHT=chosen.right, PADDED_LEFT=chosen.padded_left, PADDED_RIGHT=chosen.padded_right,
            ROWS=ROWS, num_warps=warps_of(chosen), num_stages=2,
        )  # fmt: skip
    return y.view(x.shape)


ROWS = 8
"""Rows of a program, which reads the two sides once."""


def warps_of(chosen: Split) -> int:
    """Warps of a program: 32 float32 of a tile for each thread, or fewer."""
    return 4 if chosen.padded_left * chosen.padded_right <= 4096 else 8


@_jit
def load_sides(x, left, right, PADDED_LEFT: tl.constexpr, PADDED_RIGHT: tl.constexpr):  # noqa: ANN201
    """What tiles of `x` are multiplied with from the left, transposed, and from the right: see `rotate_tile`."""
    i = tl.arange(0, PADDED_LEFT)
    j = tl.arange(0, PADDED_RIGHT)
    across = tl.load(left + i[None, :] * PADDED_LEFT + i[:, None])
    along = tl.load(right + j[:, None] * PADDED_RIGHT + j[None, :])
    if x.dtype.element_ty == tl.bfloat16:
        return across.to(tl.bfloat16), along.to(tl.bfloat16)
    else:  # noqa: RET505 (Triton compiles both branches where a return is followed by another)
        return across.to(tl.float32), along.to(tl.float32)


@_jit
def rotate_tile(x, across, along):  # noqa: ANN201
    """A row as a tile ``[PADDED_LEFT, PADDED_RIGHT]`` (zeros where padded) times H, but for its factor, in float32.

    y[a, b] = sum_ij left[i, a] x[i, j] right[j, b]; x is bfloat16 or float32, and the sides are of its dtype. Products
    with +-1 are exact in any dtype that holds the other factor: one that has more bits than the matrix units take is
    multiplied as two parts, with 16 bits together in bfloat16 and 22 in tf32.
    """
    if x.dtype == tl.bfloat16:
        half = tl.dot(across, x)
        high = half.to(tl.bfloat16)
        y = tl.dot(high, along)
        y = tl.dot((half - high.to(tl.float32)).to(tl.bfloat16), along, y)
    else:
        high = _high_bits(x)
        half = tl.dot(across, high, input_precision="tf32")
        half = tl.dot(across, x - high, half, input_precision="tf32")
        high = _high_bits(half)
        y = tl.dot(high, along, input_precision="tf32")
        y = tl.dot(half - high, along, y, input_precision="tf32")
    return y


@_jit
def _high_bits(x):
    """What tf32 holds of float32: sign, exponent and 10 bits."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@_jit
def _hadamard_kernel(
    x, y, left, right, factor, count,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED_LEFT: tl.constexpr, PADDED_RIGHT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows a program, one after the other."""
    i = tl.arange(0, PADDED_LEFT)
    j = tl.arange(0, PADDED_RIGHT)
    inside = (i < LEFT)[:, None] & (j < RIGHT)[None, :]
    at = i[:, None] * RIGHT + j[None, :]
    across, along = load_sides(x, left, right, PADDED_LEFT, PADDED_RIGHT)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, count)):
        start = row * (LEFT * RIGHT)
        tile = tl.load(x + start + at, mask=inside, other=0.0).to(across.dtype)
        tl.store(y + start + at, (rotate_tile(tile, across, along) * factor).to(y.dtype.element_ty), mask=inside)


torch.library.impl("graphwright::hadamard", "cpu", _cpu)
torch.library.impl("graphwright::hadamard", "cuda", _cuda)
register(torch.ops.graphwright.hadamard.default, reference, CONTRACT)
