"""Contracts: what they accept, the reason they give otherwise, and that they never guard a symbolic size."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels.contract import FLOATS, Argument, Contract, Operator, Size, Spec, missing_kernel

ATTENTION = Contract(
    "attention",
    {
        "query": Argument("B H N D", FLOATS),
        "key": Argument("B G M D", FLOATS),
        "mask": Argument("... N M", (torch.bool,), optional=True),
    },
    sizes={
        "D": Size(one_of=(64, 128)),
        "H": Size(multiple_of="G"),
        "M": Size(minimum=1, maximum=4096),
        "block": Size(16),
    },
)
QUERY = Spec((2, 8, 5, 64), torch.float16)
KEY = Spec((2, 4, 7, 64), torch.float16)


@pytest.mark.parametrize(
    "arguments",
    [
        {"query": QUERY, "key": KEY},
        {"query": QUERY, "key": KEY, "mask": None},
        {"query": QUERY, "key": KEY, "mask": Spec((5, 7), torch.bool)},
        {"query": QUERY, "key": KEY, "mask": Spec((2, 1, 5, 7), torch.bool), "block": 16},
        {"query": torch.empty(QUERY.shape), "key": torch.empty(KEY.shape, device="meta"), "device": "cpu"},
        {"query": QUERY, "key": KEY, "device": "cuda", "capability": (8, 9)},
    ],
)
def test_accepts(arguments):
    assert ATTENTION.check(**arguments) is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"query": QUERY}, "got key=None, expected a tensor [B G M D]"),
        ({"query": 3, "key": KEY}, "got query=3, expected a tensor [B H N D]"),
        (
            {"query": QUERY, "key": KEY, "value": KEY},
            "got an argument value, expected query, key, mask, D, H, M, block",
        ),
        (
            {"query": Spec(QUERY.shape, torch.int8), "key": KEY},
            "got query of torch.int8, expected torch.float32 or torch.float16 or torch.bfloat16",
        ),
        ({"query": Spec((8, 5, 64), torch.float16), "key": KEY}, "got query of shape [8, 5, 64], expected [B H N D]"),
        (
            {"query": QUERY, "key": Spec((3, 4, 7, 64), torch.float16)},
            "got key of shape [3, 4, 7, 64], expected [B G M D] with B=2 of query",
        ),
        (
            {"query": QUERY, "key": KEY, "mask": Spec((5, 6), torch.bool)},
            "got mask of shape [5, 6], expected [... N M] with M=7 of key",
        ),
        (
            {"query": Spec((2, 9, 5, 64), torch.float16), "key": KEY},
            "got H=9 in query, expected a multiple of G=4",
        ),
        (
            {"query": Spec((2, 8, 5, 32), torch.float16), "key": Spec((2, 4, 7, 32), torch.float16)},
            "got D=32 in query, expected one of 64, 128",
        ),
        ({"query": QUERY, "key": Spec((2, 4, 0, 64), torch.float16)}, "got M=0 in key, expected at least 1"),
        ({"query": QUERY, "key": Spec((2, 4, 4097, 64), torch.float16)}, "got M=4097 in key, expected at most 4096"),
        ({"query": QUERY, "key": KEY, "block": 8}, "got block=8, expected at least 16"),
        ({"query": QUERY, "key": KEY, "device": "mps"}, "got device mps, expected cpu or cuda"),
        (
            {"query": QUERY, "key": KEY, "device": "cuda", "capability": (7, 5)},
            "got CUDA capability 7.5, expected at least 8.0",
        ),
    ],
)
def test_refuses_with_the_reason(arguments, reason):
    assert ATTENTION.check(**arguments) == reason
    with pytest.raises(InvalidArgument, match=r"^attention: got "):
        ATTENTION.require(**arguments)


def test_a_size_of_one_or_a_letter():
    contract = Contract("masked", {"x": Argument("B H", FLOATS), "bias": Argument("1|B 1|H", FLOATS, optional=True)})
    x = Spec((2, 3), torch.float32)
    for shape in ((1, 1), (2, 1), (1, 3), (2, 3)):
        assert contract.check(x=x, bias=Spec(shape, torch.float32)) is None
    reason = "got bias of shape [3, 3], expected [1|B 1|H] with B=2 of x"
    assert contract.check(x=x, bias=Spec((3, 3), torch.float32)) == reason
    size = ShapeEnv().create_unbacked_symint()
    assert "with B=" in str(contract.check(x=x, bias=Spec((size, 3), torch.float32)))
    assert contract.check(x=x, bias=Spec((size, 3), torch.float32), proved=False) is None


def test_symbolic_sizes_are_proved_or_refused_and_never_guarded():
    shapes = ShapeEnv()
    n, m = shapes.create_unbacked_symint(), shapes.create_unbacked_symint()
    torch._check(m >= 1)
    torch._check(m <= 100)
    query, key = Spec((2, 8, n, 64), torch.float16), Spec((2, 4, m, 64), torch.float16)
    assert ATTENTION.check(query=query, key=key, mask=Spec((n, m), torch.bool)) is None
    swapped = Spec((m, n), torch.bool)
    assert "with N=" in str(ATTENTION.check(query=query, key=key, mask=swapped))
    assert ATTENTION.check(query=query, key=key, mask=swapped, proved=False) is None
    wrong = Spec((n, m + 1), torch.bool)
    assert "with M=" in str(ATTENTION.check(query=query, key=key, mask=wrong, proved=False))
    assert not shapes.guards


def test_missing_kernel_names_operator_device_reason_and_the_way_out():
    operator = Operator("attention", torch.ops.aten.linear.default, torch.nn.functional.linear, ATTENTION)
    error = missing_kernel(operator, "mps", "no Triton")
    assert isinstance(error, MissingKernel)
    for part in ("graphwright::attention", "'mps'", "no Triton", "cpu or cuda"):
        assert part in str(error)
