"""The operator on the CPU: against the definition, at the edges, refused where it must be, and in exported graphs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import nm_sparsify as module
from graphwright.kernels.contract import FLOATS, OPERATORS
from graphwright.kernels.nm_sparsify import BLOCKS, nm_sparsify, reference
from graphwright.kernels.nm_sparsify_cpu import select

from .interpreter import Call, call_with


def by_definition(x: torch.Tensor, factors: torch.Tensor | None, n: int, m: int) -> torch.Tensor:
    """Plain loops over tokens, blocks and channels, by Python's stable sort."""
    y = torch.zeros_like(x)
    scores = x.float().abs() * (1 if factors is None else factors)
    for t, row in enumerate(scores.tolist()):
        for start in range(0, len(row), m):
            order = sorted(range(start, start + m), key=lambda k: -row[k])  # stable: ties to the lowest channel
            for k in order[:n]:
                y[t, k] = x[t, k]
    return y


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits."""
    kind = torch.int32 if a.dtype is torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    blocks=st.integers(1, 5),
    pattern=st.sampled_from(BLOCKS).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    dtype=st.sampled_from(FLOATS),
    weighted=st.booleans(),
    coarse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernel_and_reference_keep_what_the_definition_says(tokens, blocks, pattern, dtype, weighted, coarse, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, blocks * pattern[1], generator=generator)
    x = (x.round() if coarse else x).to(dtype)  # rounded to whole numbers, most scores tie
    factors = torch.rand(x.shape[1], generator=generator) if weighted else None
    factors = factors.mul(4).round() if coarse and factors is not None else factors
    wanted = by_definition(x, factors, *pattern)
    assert same(reference(x, factors, *pattern), wanted)
    assert same(nm_sparsify(x, factors, *pattern), wanted)


@pytest.mark.parametrize("m", BLOCKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_exactly_n_of_m_are_kept(m, dtype):
    x = torch.randn(300, 3 * m).to(dtype)
    x[x == 0] = 1
    for n in range(1, m + 1):
        kept = nm_sparsify(x, torch.rand(3 * m) + 0.5, n, m).view(-1, m) != 0
        assert (kept.sum(-1) == n).all()


def test_ties_go_to_the_lowest_channel():
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 2.0, -2.0, 2.0]])
    assert nm_sparsify(x, None, 2, 4).tolist() == [[1, -1, 0, 0], [0, 2, -2, 0]]


def test_factors_rank_and_are_not_multiplied():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert nm_sparsify(x, torch.tensor([100.0, 1, 1, 0]), 2, 4).tolist() == [[1, 0, 3, 0]]


def test_nan_and_infinity_are_kept_and_zeros_are_zero():
    x = torch.randn(3, 8)
    x[0, 1], x[0, 6] = float("nan"), float("-inf")
    x[1] = 0
    x[2] = -0.0
    for operator in (nm_sparsify, reference):
        y = operator(x, None, 1, 4)
        assert y[0].isnan().sum() == 1
        assert y[0, 6] == float("-inf")
        assert (y[1:] == 0).all()


def test_any_leading_dimensions_and_strides():
    x, factors = torch.randn(30, 16), torch.rand(16)
    y = nm_sparsify(x, factors, 4, 8)
    assert torch.equal(nm_sparsify(x.view(2, 3, 5, 16), factors, 4, 8), y.view(2, 3, 5, 16))
    assert torch.equal(nm_sparsify(x[7], factors, 4, 8), y[7])
    assert torch.equal(nm_sparsify(x.T.contiguous().T, factors, 4, 8), y)
    assert torch.equal(nm_sparsify(x[::2], torch.stack([factors, factors], 1)[:, 0], 4, 8), y[::2])
    assert nm_sparsify(x.new_empty(4, 0, 16), factors, 4, 8).shape == (4, 0, 16)


def test_many_tokens_in_threads():
    x, factors = torch.randn(1100, 256), torch.rand(256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert same(nm_sparsify(x, factors, 8, 16), reference(x, factors, 8, 16))
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_the_reference_runs():
    x, factors = torch.randn(6, 32), torch.rand(32)
    calls = [Call(f"graphwright.kernels.nm_sparsify:{name}", (x, factors, 4, 8)) for name in ("_cpu", "reference")]
    calls.append(Call("graphwright.kernels.nm_sparsify_cpu:select", (x, factors, 4, 8)))
    got, wanted, nothing = call_with(calls, CC="")
    assert same(got, wanted)
    assert nothing is None
    assert select(x, factors, 4, 8) is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.ones(3, 16, dtype=torch.float64)}, "got x of torch.float64"),
        ({"x": torch.ones(3, 18)}, r"got K=18 in x, expected a multiple of m=4"),
        ({"x": torch.tensor(1.0)}, r"got x of shape \[\], expected \[... K\]"),
        ({"factors": torch.ones(8)}, r"got factors of shape \[8\], expected \[K\] with K=16 of x"),
        ({"factors": torch.ones(16, dtype=torch.float16)}, "got factors of torch.float16, expected torch.float32"),
        ({"n": 5}, "got n=5 of m=4, expected 1 to 4"),
        ({"n": 0}, "got n=0, expected at least 1"),
        ({"m": 6}, "got m=6, expected"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_the_contract_does_not_hold(change, reason, device):
    arguments = {"x": torch.ones(3, 16), "factors": None, "n": 2, "m": 4, **change}
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(InvalidArgument, match=f"^nm_sparsify: {reason}"):
        nm_sparsify(**moved)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    torch.library.opcheck(nm_sparsify, (torch.randn(5, 24).to(dtype), torch.rand(24), 4, 8))


def test_export_keeps_one_node_and_the_dynamic_number_of_tokens():
    class Select(torch.nn.Module):
        def forward(self, x):
            return nm_sparsify(x, None, 4, 8)

    tokens = torch.export.Dim("tokens", min=0, max=1 << 20)
    program = torch.export.export(Select(), (torch.randn(2, 6, 24),), dynamic_shapes=({1: tokens},), strict=False)
    program = program.run_decompositions({})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [OPERATORS["nm_sparsify"].overload]
    for count in (0, 1, 7):
        x = torch.randn(2, count, 24)
        assert same(program.module()(x), nm_sparsify(x, None, 4, 8))


def test_without_triton_the_cpu_kernel_works_and_the_cuda_kernel_says_so():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from graphwright.kernels import nm_sparsify as module
        case = torch.ones(2, 4), None, 2, 4
        assert module.nm_sparsify(*case).shape == (2, 4)
        module._cuda(*case)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingKernel: graphwright::nm_sparsify has no kernel" in done.stderr
    assert "triton is not installed" in done.stderr


def test_other_devices_get_the_missing_kernel_error():
    with pytest.raises(MissingKernel, match="graphwright::nm_sparsify has no kernel for device 'cpu'"):
        module.nm_sparsify._init_fn(torch.ones(1, 4), None, 2, 4)
