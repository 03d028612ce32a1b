"""The operator on the CPU: against an exact oracle, at the edges, refused where it must be, and in exported graphs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import int8_linear as module
from graphwright.kernels.contract import FLOATS, OPERATORS
from graphwright.kernels.int8_linear import int8_linear, quantize_per_channel, reference

from .interpreter import Call, call_with
from .oracle import assert_within_rounding, make_case


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 40) | st.sampled_from([511, 512, 513, 1030]),
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 200)),
    dtype=st.sampled_from(FLOATS),
    exponent=st.integers(-40, 30),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernel_and_reference_agree_with_the_exact_sum(tokens, sizes, dtype, exponent, bias, seed):
    exponent = max(-8, min(exponent, 4)) if dtype == torch.float16 else exponent
    case = make_case(tokens, *sizes, dtype=dtype, bias=bias, magnitude=10.0**exponent, seed=seed)
    assert_within_rounding(int8_linear(*case), *case)
    assert_within_rounding(reference(*case), *case)


@pytest.mark.parametrize("k", [1, 64, 1040, 4099])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_integer_sum_is_exact_at_its_largest(k, sign):
    x = torch.full((3, k), 127.0)
    x[1] *= sign
    weight = torch.full((2, k), 127 * sign, dtype=torch.int8)
    weight[1] = -128
    got = int8_linear(x, weight, torch.ones(2))
    assert torch.equal(got, (x.double() @ weight.double().T).float())


def test_the_integer_sum_is_exact_without_vnni():
    """ONEDNN_MAX_CPU_ISA stands for an older processor; there oneDNN's own int8 product saturates."""
    cases = [make_case(tokens, 2100, 9, magnitude=1.0, seed=tokens) for tokens in (1, 20)]
    for x, *_ in cases:
        x.copy_(x.sign() * 100)
    calls = [Call("graphwright.kernels.int8_linear:_cpu", case) for case in cases]
    for got, case in zip(call_with(calls, ONEDNN_MAX_CPU_ISA="AVX2"), cases, strict=True):
        assert_within_rounding(got, *case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_zeros_give_the_bias_and_rows_without_a_scale_give_nan(dtype):
    x, weight, scale, bias = make_case(6, 40, 8, dtype=dtype, bias=True)
    x[0] = 0
    x[1] = -0.0
    x[2, 3] = float("nan")
    x[3, 0] = float("inf")
    x[4, 39] = -float("inf")
    for operator in (int8_linear, reference):
        y = operator(x, weight, scale, bias)
        assert torch.equal(y[:2], bias.expand(2, -1))
        assert y[2:5].isnan().all()
        assert y[5].isfinite().all()


def test_any_leading_dimensions_and_strides():
    x, weight, scale, bias = make_case(30, 24, 8, bias=True)
    y = int8_linear(x, weight, scale, bias)
    assert torch.equal(int8_linear(x.view(2, 3, 5, 24), weight, scale, bias), y.view(2, 3, 5, 8))
    assert torch.equal(int8_linear(x[7], weight, scale, bias), y[7])
    assert torch.equal(int8_linear(x.T.contiguous().T, weight.T.contiguous().T, scale, bias), y)
    assert torch.equal(int8_linear(x[::2], weight[::2], scale[::2], bias[::2]), y[::2, ::2])
    # The stride of a dimension of size 1 may be anything, and a broadcast one is 0.
    assert torch.equal(int8_linear(x[:1].as_strided((1, 24), (0, 1)), weight, scale, bias), y[:1])
    assert torch.equal(int8_linear(x, weight[:1].as_strided((1, 24), (0, 1)), scale[:1], bias[:1]), y[:, :1])
    same = weight[:1].expand(8, -1)
    assert torch.equal(
        int8_linear(x[:1].expand(5, -1), same, scale), int8_linear(x[:1], same.clone(), scale).expand(5, -1)
    )
    assert int8_linear(x.new_empty(4, 0, 24), weight, scale, bias).shape == (4, 0, 8)


def test_inputs_are_left_alone():
    case = make_case(5, 24, 8, bias=True)
    before = [tensor.clone() for tensor in case]
    int8_linear(*case)
    assert all(torch.equal(a, b) for a, b in zip(before, case, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.ones(3, 16, dtype=torch.float64)}, "got x of torch.float64"),
        ({"x": torch.ones(3, 15)}, r"got weight of shape \[8, 16\], expected \[N K\] with K=15 of x"),
        ({"x": torch.tensor(1.0)}, r"got x of shape \[\], expected \[... K\]"),
        ({"x": torch.ones(3, 0), "weight": torch.ones(8, 0, dtype=torch.int8)}, "got K=0 in x, expected at least 1"),
        ({"weight": torch.ones(8, 16)}, "got weight of torch.float32, expected torch.int8"),
        ({"scale": torch.ones(1)}, r"got scale of shape \[1\], expected \[N\] with N=8 of weight"),
        ({"scale": torch.ones(8, dtype=torch.float16)}, "got scale of torch.float16, expected torch.float32"),
        ({"bias": torch.ones(7)}, r"got bias of shape \[7\], expected \[N\] with N=8 of weight"),
        ({"bias": torch.ones(8, dtype=torch.int8)}, "got bias of torch.int8"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_the_contract_does_not_hold(change, reason, device):
    good = {"x": torch.ones(3, 16), "weight": torch.ones(8, 16, dtype=torch.int8), "scale": torch.ones(8), "bias": None}
    arguments = {name: value if value is None else value.to(device) for name, value in {**good, **change}.items()}
    with pytest.raises(InvalidArgument, match=f"^int8_linear: {reason}"):
        int8_linear(**arguments)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_quantize_per_channel_is_symmetric_and_rounds_to_even(dtype):
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0], [-254.0, 1.0, 3.0, 254.0]], dtype=dtype)
    quantized, scale = quantize_per_channel(weight)
    assert quantized.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [-127, 0, 2, 127]]
    assert scale[[0, 2]].tolist() == [1.0, 2.0]
    assert (quantized.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert ((quantized * scale[:, None] - weight).abs() <= scale[:, None] / 2).all()


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.tensor([[1.0], [float("nan")]]), r"output channels \[1\]"),
        (torch.tensor([[float("inf")], [1.0]]), r"output channels \[0\]"),
        (torch.ones(2, 2, dtype=torch.int8), "expected a float matrix"),
        (torch.ones(2), "expected a float matrix"),
    ],
)
def test_quantize_per_channel_refuses(weight, reason):
    with pytest.raises(InvalidArgument, match=reason):
        quantize_per_channel(weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(dtype, bias):
    torch.library.opcheck(int8_linear, make_case(5, 24, 8, dtype=dtype, bias=bias))


class _Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, self.weight, self.scale, self.bias = map(torch.nn.Buffer, make_case(0, 24, 8, bias=True))

    def forward(self, x):
        return int8_linear(x, self.weight, self.scale, self.bias)


def test_export_keeps_one_node_and_the_dynamic_number_of_tokens():
    linear = _Linear()
    tokens = torch.export.Dim("tokens", min=0, max=1 << 20)
    program = torch.export.export(linear, (torch.randn(2, 6, 24),), dynamic_shapes=({1: tokens},), strict=False)
    program = program.run_decompositions({})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [OPERATORS["int8_linear"].overload]
    for count in (0, 1, 7, 700):
        x = torch.randn(2, count, 24)
        assert torch.equal(program.module()(x), linear(x))


def test_without_triton_the_cpu_kernel_works_and_the_cuda_kernel_says_so():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from graphwright.kernels import int8_linear as module
        case = torch.ones(2, 4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3)
        assert module.int8_linear(*case).shape == (2, 3)
        module._cuda(*case)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingKernel: graphwright::int8_linear has no kernel" in done.stderr
    assert "triton is not installed" in done.stderr


def test_other_devices_get_the_missing_kernel_error():
    with pytest.raises(MissingKernel, match="graphwright::int8_linear has no kernel for device 'cpu'"):
        module.int8_linear._init_fn(*make_case(1, 4, 4))
