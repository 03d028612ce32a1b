"""4-bit linears on the CPU: packing, rounding, products against an exact oracle, the edges and the refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import int4_linear as module
from graphwright.kernels.contract import FLOATS, OPERATORS
from graphwright.kernels.int4_linear import int4_linear, reference
from graphwright.kernels.int4_weight_linear import int4_weight_linear
from graphwright.kernels.int4_weight_linear import reference as weight_reference
from graphwright.kernels.int4_weights import Int4, dequantized, pack, quantize_groups, unpack

from .int4_oracle import assert_close_to_exact, make_int4_case
from .interpreter import Call, call_with


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), groups=st.integers(1, 5), group=st.sampled_from([32, 64]), seed=st.integers(0, 2**31))
def test_pack_and_unpack_agree(n, groups, group, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (n, groups * group), generator=generator, dtype=torch.int8)
    steps = torch.randint(1, 17, (n, groups), generator=generator, dtype=torch.int8)
    made = pack(values, steps, torch.ones(n))
    whole = values.int() * steps.int().repeat_interleave(group, 1)
    assert torch.equal(unpack(made.packed, made.steps)[:, :n].t().int(), whole)
    assert not unpack(made.packed, made.steps)[:, n:].any(), "padding is zero"
    assert torch.equal(made.sums, whole.sum(1).int())
    assert made.packed.shape == (-(-n // 64), groups * group, 32)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_is_close_to_free_scales(group):
    """A free scale a group, found by the same search over 80 shrinks, is the published grid."""
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(1))
    groups = weight.unflatten(1, (-1, group))
    best, free = torch.full(groups.shape[:2], float("inf")), torch.zeros_like(groups)
    for shrink in range(80):
        scale = groups.abs().amax(-1, keepdim=True) / 7 * (1 - shrink / 100)
        tried = (groups / scale).round().clamp(-8, 7) * scale
        error = (tried - groups).abs().pow(2.4).sum(-1)
        free = torch.where((error < best)[..., None], tried, free)
        best = torch.minimum(best, error)
    ours = (dequantized(quantize_groups(weight, group)) - weight).norm()
    assert ours <= 1.05 * (free.flatten(1) - weight).norm()


def test_what_lies_on_the_grid_stays():
    values = torch.randint(-7, 8, (70, 128), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    values[:, ::64] = 7
    steps = torch.randint(1, 17, (70, 2), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    steps[:, 0] = 16
    weight = dequantized(pack(values, steps, torch.rand(70) + 0.5))
    assert torch.allclose(dequantized(quantize_groups(weight, 64)), weight, rtol=1e-6, atol=0)


def test_zeros_stay_zeros():
    made = quantize_groups(torch.zeros(3, 64), 32)
    assert not dequantized(made).any()
    assert made.scale.isfinite().all()


@pytest.mark.parametrize(
    ("weight", "group", "reason"),
    [
        (torch.ones(4, 96), 64, "groups of 64 do not divide 96 channels; 32 does"),
        (torch.ones(4, 100), 64, "groups of 64 do not divide 100 channels; no group does"),
        (torch.ones(4, 96), 48, "groups of 48 do not divide 96"),
        (torch.ones(4), 32, "expected a float matrix"),
        (torch.ones(4, 32, dtype=torch.int8), 32, "expected a float matrix"),
        (torch.full((2, 32), float("nan")), 32, r"NaN or infinity in output channels \[0, 1\]"),
    ],
)
def test_weights_that_cannot_be_rounded(weight, group, reason):
    with pytest.raises(InvalidArgument, match=reason):
        quantize_groups(weight, group)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20) | st.sampled_from([512, 513]),
    k=st.sampled_from([32, 64, 192, 320]),
    n=st.integers(1, 130),
    dtype=st.sampled_from(FLOATS),
    bits=st.sampled_from([4, 8]),
    clip=st.sampled_from([1.0, 0.9]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernel_and_reference_agree_with_the_exact_sum(tokens, k, n, dtype, bits, clip, bias, seed):
    case = make_int4_case(tokens, k, n, dtype=dtype, bias=bias, seed=seed)
    assert_close_to_exact(int4_linear(*case, bits, clip), case, bits, clip, few=tokens <= 8)
    assert_close_to_exact(reference(*case, bits, clip), case, bits, clip)


def test_older_processors_compute_the_same():
    """Without VNNI and AVX-512: no integer product, and no packed one."""
    cases = [make_int4_case(tokens, 192, 70, bias=True) for tokens in (3, 20)]
    calls = [Call("int4_oracle:compute", (*case, 8, 1.0, False)) for case in cases]
    for y, case in zip(call_with(calls, ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2"), cases, strict=True):
        assert_close_to_exact(y, case, 8, 1.0, few=len(case[0]) <= 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [4, 20])
def test_the_rotation_is_part_of_the_operator(bits, tokens):
    """Rounding after a rotation: ties may fall to the other side, so a few integers may differ by one."""
    x, *weight = make_int4_case(tokens, 192, 70)
    got = int4_linear(x, *weight, bits, 1.0, True)
    expected = reference(x, *weight, bits, 1.0, True)
    assert (got - expected).norm() <= (0.01 if bits == 8 else 0.02) * expected.norm()
    unrotated = int4_linear(x, *weight, bits, 1.0, False)
    assert (unrotated - expected).norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("tokens", [6, 12])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_give_the_bias_and_rows_without_a_scale_give_nan(dtype, tokens, bits):
    x, *rest = make_int4_case(tokens, 64, 9, dtype=dtype, bias=True)
    x[0] = 0
    x[1] = -0.0
    x[2, 3] = float("nan")
    x[3, 0] = float("inf")
    x[4, 63] = -float("inf")
    for operator in (int4_linear, reference):
        y = operator(x, *rest, bits)
        assert torch.equal(y[:2], rest[-1].expand(2, -1))
        assert y[2:5].isnan().all()
        assert y[5:].isfinite().all()


def test_any_leading_dimensions_and_inputs_are_left_alone():
    case = make_int4_case(30, 64, 9, bias=True)
    before = [tensor.clone() for tensor in case]
    y = int4_linear(*case)
    assert torch.equal(int4_linear(case[0].view(2, 3, 5, 64), *case[1:]), y.view(2, 3, 5, 9))
    assert torch.equal(int4_linear(case[0].t().contiguous().t(), *case[1:]), y)
    assert all(torch.equal(a, b) for a, b in zip(before, case, strict=True))


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), n=st.integers(1, 130), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**31))
def test_weight_only(tokens, n, dtype, seed):
    x, packed, steps, scale, _, bias = make_int4_case(tokens, 192, n, dtype=dtype, bias=True, seed=seed)
    whole = unpack(packed, steps)[:, :n].double()
    exact = x.double() @ whole * scale.double() + bias.double()
    size = x.double().abs() @ whole.abs() * scale.double() + bias.double().abs()
    for y, few in (
        (int4_weight_linear(x, packed, steps, scale, bias), tokens <= 8),
        (weight_reference(x, packed, steps, scale, bias), False),
    ):
        # Few tokens: x and the sum in bfloat16, half an ulp each; else float32 sums of 192 terms.
        rounding = 2 * 2.0**-8 if few else 200 * torch.finfo(torch.float32).eps
        assert ((y.double() - exact).abs() <= rounding * size + torch.finfo(dtype).eps * exact.abs() + 1e-30).all()


GOOD = dict(zip(("x", "weight", "steps", "scale", "sums"), make_int4_case(3, 64, 9), strict=False), bias=None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.ones(3, 64, dtype=torch.float64)}, "got x of torch.float64"),
        ({"x": torch.ones(3, 32)}, "got weight of shape"),
        ({"weight": torch.ones(1, 64, 32)}, "got weight of torch.float32, expected torch.uint8"),
        ({"weight": torch.ones(2, 64, 32, dtype=torch.uint8)}, "got 2 blocks"),
        ({"weight": torch.ones(1, 64, 16, dtype=torch.uint8)}, "got H=16"),
        ({"steps": torch.ones(3, 64, dtype=torch.int8)}, "got 3 groups of 64 channels"),
        ({"steps": torch.ones(2, 60, dtype=torch.int8)}, "got P=60"),
        ({"scale": torch.ones(8)}, "got sums of shape"),
        ({"sums": torch.ones(9)}, "got sums of torch.float32"),
        ({"bias": torch.ones(7)}, "got bias of shape"),
        ({"bits": 5}, "got bits=5, expected one of 4, 8"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_the_contract_does_not_hold(change, reason, device):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in {**GOOD, **change}.items()
    }
    with pytest.raises(InvalidArgument, match=f"^int4_linear: {reason}"):
        int4_linear(**arguments)


def test_opcheck():
    torch.library.opcheck(int4_linear, (*make_int4_case(5, 64, 9, bias=True), 8, 0.9, False))
    x, packed, steps, scale, _, bias = make_int4_case(5, 64, 9, bias=True)
    torch.library.opcheck(int4_weight_linear, (x, packed, steps, scale, bias))


def test_export_keeps_one_node_and_the_dynamic_number_of_tokens():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, *tensors = make_int4_case(0, 64, 9, bias=True)
            for name, tensor in zip((*Int4._fields, "bias"), tensors, strict=True):
                self.register_buffer(name, tensor)

        def forward(self, x):
            return int4_linear(x, self.packed, self.steps, self.scale, self.sums, self.bias)

    linear = Linear()
    tokens = torch.export.Dim("tokens", min=0, max=1 << 20)
    program = torch.export.export(linear, (torch.randn(2, 6, 64),), dynamic_shapes=({1: tokens},), strict=False)
    program = program.run_decompositions({})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [OPERATORS["int4_linear"].overload]
    for count in (0, 1, 7, 700):
        x = torch.randn(2, count, 64)
        assert torch.equal(program.module()(x), linear(x))


def test_other_devices_get_the_missing_kernel_error():
    with pytest.raises(MissingKernel, match="graphwright::int4_linear has no kernel for device 'cpu'"):
        module.int4_linear._init_fn(*make_int4_case(1, 64, 4))
