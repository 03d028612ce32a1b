"""Hadamard rotations: the orders that exist, the operator against the dense matrix, its kernels, and its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument
from graphwright.kernels.hadamard import ROWS, hadamard, matrix, orders, reference, signs, split, tile_fits, warps_of

from .aot import Request, compile_kernels
from .interpreter import Call, interpret


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 48, 60, 64, 84, 108, 128])
def test_factors_are_hadamard_matrices(order):
    h = signs(order).int()
    assert h.abs().eq(1).all()
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int32))


def test_the_first_kind_of_paley_is_not_symmetric_and_the_second_is():
    """Using H for the activations and H^T for the weights would go unnoticed with Sylvester's matrices alone."""
    assert not torch.equal(signs(12), signs(12).T)
    assert torch.equal(signs(36), signs(36).T)
    assert not torch.equal(matrix(576), matrix(576).T)


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (576, "H4 x H12 x H12"),
        (1536, "H8 x H12 x H16"),
        (64, "H64"),
        (1, "H1"),
        (9, "9 blocks of H1"),
        (11008, "43 blocks of H16 x H16"),
        (4096, "H64 x H64"),
    ],
)
def test_orders(n, said):
    assert str(orders(n)) == said


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700))
def test_every_size_has_an_orthogonal_rotation_in_whole_blocks(n):
    blocks, factors = orders(n)
    product = 1
    for factor in factors:
        product *= factor
    assert blocks * product == n
    h = matrix(n)
    assert (h @ h.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    n=st.integers(1, 200) | st.sampled_from([576, 1536, 640]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_the_operator_is_the_dense_product(tokens, n, dtype, seed):
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    exact = x.double() @ matrix(n)
    # Each factor adds its order's terms in float32 (float64), and the result is rounded to the dtype once.
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = (sum(orders(n).factors) + 2) * wide * x.double().norm(dim=-1, keepdim=True)
    bound = bound + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    for y in (hadamard(x), reference(x)):
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= bound).all()


def test_outliers_are_spread():
    x = torch.zeros(1, 576)
    x[0, 5] = 24.0
    assert torch.allclose(hadamard(x).abs(), torch.ones(1, 576), atol=1e-5)


def test_shapes_strides_and_the_input():
    x = torch.randn(2, 3, 24)
    before = x.clone()
    y = hadamard(x)
    assert torch.equal(x, before)
    assert torch.equal(hadamard(x.transpose(0, 1)), y.transpose(0, 1))
    one = torch.randn(4, 1)
    assert torch.equal(hadamard(one), one)
    assert hadamard(one).data_ptr() != one.data_ptr()


@pytest.mark.parametrize("x", [torch.ones(3, 4, dtype=torch.int8), torch.tensor(1.0), torch.ones(3, 0)])
def test_refusals(x):
    with pytest.raises(InvalidArgument, match=r"^hadamard: "):
        hadamard(x)


def test_unknown_orders_are_refused():
    with pytest.raises(InvalidArgument, match="no Hadamard matrix of order 172"):
        signs(172)
    with pytest.raises(InvalidArgument, match="at least 1"):
        orders(0)


def test_opcheck_and_dynamic_export():
    torch.library.opcheck(hadamard, (torch.randn(5, 24),))

    class Rotates(torch.nn.Module):
        def forward(self, x):
            return hadamard(x)

    program = torch.export.export(
        Rotates(), (torch.randn(6, 24),), dynamic_shapes=({0: torch.export.Dim("t", min=0, max=99)},)
    )
    for count in (0, 1, 50):
        x = torch.randn(count, 24)
        assert torch.equal(program.module()(x), hadamard(x))


SIZES = [1, 12, 40, 64, 576, 1536]


def test_the_interpreted_kernel():
    cases = [torch.randn(3, n).to(dtype) for n in SIZES for dtype in (torch.float32, torch.float16)]
    for y, x in zip(interpret([Call("graphwright.kernels.hadamard:launch", (x,)) for x in cases]), cases, strict=True):
        exact = x.double() @ matrix(x.shape[-1])
        bound = 2 * x.shape[-1] * torch.finfo(torch.float32).eps * x.double().norm(dim=-1, keepdim=True)
        assert ((y.double() - exact).abs() <= bound + torch.finfo(x.dtype).eps * exact.abs()).all()


def test_the_kernel_compiles_within_the_limits_of_each_device():
    requests = []
    for n, kind in ((64, "*fp32"), (576, "*bf16"), (1536, "*fp32"), (1536, "*bf16"), (4096, "*fp32"), (8192, "*bf16")):
        chosen = split(n)
        assert tile_fits(n, 2 if kind == "*bf16" else 4)
        names = ("LEFT", "RIGHT", "PADDED_LEFT", "PADDED_RIGHT")
        constants = {**dict(zip(names, chosen, strict=True)), "ROWS": ROWS}
        pointers = {"x": kind, "y": kind, "left": "*i8", "right": "*i8", "factor": "fp32", "count": "i32"}
        kernel = "graphwright.kernels.hadamard:_hadamard_kernel"
        warps = warps_of(chosen)
        requests += [Request(kernel, pointers, constants, sm, warps, num_stages=2) for sm in (80, 89, 90)]
    for made, request in zip(compile_kernels(requests), requests, strict=True):
        assert made.fits(request.sm), (request, made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [*SIZES, 4096, 8192, 11008, 14336])
def test_on_the_gpu(n):
    x = torch.randn(7, n)
    assert torch.allclose(hadamard(x.cuda()).cpu(), reference(x), atol=1e-4)
    half = x.bfloat16()
    found, wanted = hadamard(half.cuda()).cpu().double(), half.double() @ matrix(n)
    assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 2**-14 * half.double().norm(dim=-1, keepdim=True)).all()
