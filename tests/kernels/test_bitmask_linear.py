"""Compressed weights and the operator that reads them: round trips, numbers, forged tensors, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from graphwright.errors import InvalidArgument
from graphwright.kernels.bitmask_linear import bitmask_linear, is_two_of_four, reference
from graphwright.kernels.bitmask_linear_cpu import FEW
from graphwright.kernels.bitmask_weights import Bitmask, bitmask_reason, compress, decompress
from graphwright.kernels.contract import FLOATS

from .interpreter import Call, call_with


def sparse(rows: int, columns: int, zeros: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) >= zeros)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 70),
    zeros=st.floats(0, 1),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_compressing_loses_nothing(rows, columns, zeros, dtype, seed):
    weight = sparse(rows, columns, zeros, dtype, seed)
    packed = compress(weight)
    assert torch.equal(decompress(packed.bits, packed.values, columns), weight)
    assert bitmask_reason(*packed, rows, columns) is None
    assert len(packed.values) == int((weight != 0).sum())


def test_bytes_at_sixty_percent():
    packed = compress(sparse(512, 512, 0.6))
    assert sum(part.nbytes for part in packed) <= 0.45 * 512 * 512 * 4


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, FEW + 2),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_product_is_that_of_the_dense_weight(tokens, rows, columns, zeros, bias, seed):
    weight = sparse(rows, columns, zeros, seed=seed)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    offset = torch.randn(rows) if bias else None
    packed = compress(weight)
    wanted = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    # A float32 sum of up to 70 products and a bias, in any order.
    size = functional.linear(x.double().abs(), weight.double().abs()) + (0 if offset is None else offset.double().abs())
    for y in (bitmask_linear(x, *packed, offset), reference(x, *packed, offset)):
        assert ((y.double() - wanted).abs() <= (columns + 2) * 2**-24 * size + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_made_dense(dtype):
    weight, x = sparse(12, 40, 0.5, dtype), torch.randn(2, 3, 40).to(dtype)
    assert torch.equal(bitmask_linear(x, *compress(weight)), functional.linear(x, weight))


def test_without_a_compiler_the_weight_is_made_dense():
    weight, x = sparse(12, 40, 0.5), torch.randn(2, 40)
    calls = [Call("graphwright.kernels.bitmask_linear:_cpu", (x, *compress(weight), None))]
    calls.append(Call("graphwright.kernels.bitmask_linear_cpu:few_tokens", (x, *compress(weight), None)))
    got, nothing = call_with(calls, CC="")
    assert torch.equal(got, functional.linear(x, weight))
    assert nothing is None


def forged(part: str, change) -> Bitmask:
    packed = compress(sparse(4, 12, 0.5))
    return packed._replace(**{part: change(getattr(packed, part).clone())})


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (forged("starts", lambda t: t.index_fill(0, torch.tensor([2]), 10**9)), "do not count the same"),
        (forged("values", lambda t: t[:-1]), "do not count the same"),
        (forged("bits", lambda t: t | 255), "bits beyond 12 channels are set"),
        (forged("bits", lambda t: t[:, :1]), r"bits are torch.uint8\[4, 1\]"),
        (forged("starts", lambda t: t.int()), r"starts are torch.int32\[5\]"),
        (forged("values", lambda t: t.long()), "values are torch.int64"),
    ],
)
def test_forged_tensors_are_no_weight(packed, reason):
    """What a file says must not let the kernel read beyond its values."""
    import re

    assert re.search(reason, bitmask_reason(*packed, 4, 12) or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.ones(3, 17)}, r"got bits \[4, 2\] and 5 starts for K=17"),
        ({"x": torch.ones(3, 12).half()}, "expected one type"),
        ({"bits": torch.zeros(4, 2)}, "got bits of torch.float32"),
        ({"starts": torch.zeros(4, dtype=torch.int64)}, "4 starts"),
        ({"bias": torch.ones(3)}, r"got bias of shape \[3\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses(change, reason, device):
    arguments = {"x": torch.ones(3, 12), **compress(sparse(4, 12, 0.5))._asdict(), "bias": None, **change}
    moved = {name: value if value is None else value.to(device) for name, value in arguments.items()}
    with pytest.raises(InvalidArgument, match=reason):
        bitmask_linear(**moved)


def test_where_sparse_tensor_cores_could_run():
    weight = torch.ones(64, 128, dtype=torch.bfloat16)
    weight.view(-1, 4)[:, 2:] = 0
    assert is_two_of_four(weight)
    assert not is_two_of_four(weight.float())
    assert not is_two_of_four(weight[:, :96])
    weight[0, 2] = 1
    assert not is_two_of_four(weight)


def test_opcheck():
    torch.library.opcheck(bitmask_linear, (torch.randn(5, 24), *compress(sparse(6, 24, 0.5)), torch.randn(6)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    weight = sparse(64, 128, 0.0, torch.float16)
    weight.view(-1, 4)[:, 2:] = 0
    for made in (weight, sparse(64, 128, 0.6, torch.float16)):
        x = torch.randn(64, 128).half()
        got = bitmask_linear(x.cuda(), *(part.cuda() for part in compress(made))).cpu().double()
        wanted = functional.linear(x.double(), made.double())
        assert ((got - wanted).abs() <= 2**-11 * wanted.abs() + 128 * 2**-24 * 128).all()
