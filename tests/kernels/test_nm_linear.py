"""Selection and product in one operator: numbers on the CPU, where sparse tensor cores could run, what is refused."""

from __future__ import annotations

import pytest
import torch

from graphwright.errors import InvalidArgument
from graphwright.kernels.nm_linear import nm_linear, reference, semi_structured_reason
from graphwright.kernels.nm_sparsify import nm_sparsify


class Half:
    """A tensor's facts on a device that is not there."""

    def __init__(self, *shape: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.device, self.dtype = torch.Size(shape), torch.device(device), dtype


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_linear_of_the_selection(bias):
    x, weight, factors = torch.randn(2, 5, 32), torch.randn(24, 32), torch.rand(32)
    offset = torch.randn(24) if bias else None
    wanted = torch.nn.functional.linear(nm_sparsify(x, factors, 4, 8), weight, offset)
    assert torch.equal(nm_linear(x, factors, weight, offset, 4, 8), wanted)
    assert torch.equal(reference(x, factors, weight, offset, 4, 8), wanted)


@pytest.mark.parametrize(
    ("x", "weight", "pattern", "reason"),
    [
        (Half(1, 512, 576), Half(1536, 576), (2, 4), None),
        (Half(1, 512, 576), Half(1536, 576), (4, 8), "sparse tensor cores know 2:4, got 4:8"),
        (Half(1, 512, 576), Half(1536, 576), (8, 16), "sparse tensor cores know 2:4, got 8:16"),
        (Half(1, 512, 576, device="cpu"), Half(1536, 576), (2, 4), "are of CUDA devices, got cpu"),
        (Half(1, 512, 576, dtype=torch.float32), Half(1536, 576), (2, 4), "multiply 16-bit floats"),
        (Half(1, 512, 576), Half(1536, 576, dtype=torch.float16), (2, 4), "multiply 16-bit floats"),
        (Half(1, 512, 96), Half(1536, 96), (2, 4), "multiples of 64, got 96 -> 1536"),
    ],
)
def test_where_sparse_tensor_cores_could_run(x, weight, pattern, reason):
    found = semi_structured_reason(x, weight, *pattern)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": torch.ones(3, 12)}, r"got weight of shape \[3, 12\]"),
        (
            {"weight": torch.ones(3, 16, dtype=torch.bfloat16)},
            "got x of torch.float32 and torch.bfloat16, expected one",
        ),
        ({"n": 5}, "got n=5 of m=4"),
    ],
)
def test_refuses(change, reason):
    arguments = {"x": torch.ones(2, 16), "factors": None, "weight": torch.ones(3, 16), "bias": None, "n": 2, "m": 4}
    with pytest.raises(InvalidArgument, match=f"^nm_linear: {reason}"):
        nm_linear(**{**arguments, **change})


def test_opcheck():
    torch.library.opcheck(nm_linear, (torch.randn(5, 16), torch.rand(16), torch.randn(3, 16), torch.randn(3), 2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [64, 7])
def test_on_the_gpu(tokens):
    x, weight, factors = torch.randn(tokens, 128).half(), torch.randn(64, 128).half(), torch.rand(128)
    got = nm_linear(x.cuda(), factors.cuda(), weight.cuda(), None, 2, 4).cpu().double()
    wanted = nm_sparsify(x, factors, 2, 4).double() @ weight.double().t()
    # float32 sums of 64 products, one rounding to float16
    assert ((got - wanted).abs() <= 2**-11 * wanted.abs() + 64 * 2**-24 * 128).all()
