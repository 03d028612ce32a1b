"""Attention of roots: against dense attention on snapped tokens, in both ways of packing, at the edges, refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import collapsed_attention as module
from graphwright.kernels.collapsed_attention import collapsed_attention, packed_attention, reference
from graphwright.kernels.contract import FLOATS, OPERATORS
from graphwright.kernels.snap_tokens import snap_tokens, token_roots


def make_roots(batch, heads, tokens, share, generator):
    """A root is an earlier token that is its own root; about `share` of the tokens have another."""
    roots = torch.arange(tokens).expand(batch, heads, -1).clone()
    moved = torch.rand(batch, heads, tokens, generator=generator) < share
    moved[..., 0] = False
    for token in range(1, tokens):
        back = torch.randint(1, 1 + min(token, 8), (batch, heads), generator=generator)
        before = roots.gather(2, (token - back)[..., None])[..., 0]
        roots[..., token] = torch.where(moved[..., token], before, token)
    return roots.int()


def make_case(
    batch=1, heads=4, kv_heads=2, queries=50, keys=70, channels=16, *, share=0.5, dtype=torch.float32, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, channels, generator=generator).to(dtype)
    key, value = torch.randn(2, batch, kv_heads, keys, channels, generator=generator).to(dtype)
    roots = (make_roots(batch, h, n, share, generator) for h, n in ((heads, queries), (kv_heads, keys)))
    return query, key, value, *roots


def assert_within_rounding(output, case, bias=None, scale=None):
    """Assert that the output is the exact one up to rounding.

    A score is a sum of D products, a weight its exponential: a relative error of twice that of the score, for the
    largest score that there is. Then come sums of M weighted values, merged ones rounded to the values' dtype.
    """
    exact = reference(*(t.double() if t.is_floating_point() else t for t in case), bias, scale=scale)
    query, key, value = case[:3]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = float((query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax()) * factor)
    half_ulp = torch.finfo(torch.float32).eps / 2
    relative = half_ulp * (2 * (query.shape[-1] + 4) * scores + key.shape[2]) + 2 * torch.finfo(query.dtype).eps
    assert output.dtype == query.dtype
    assert float((output.double() - exact).abs().max()) <= relative * float(value.double().abs().max())


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 60), st.integers(1, 60), st.integers(1, 40)),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    bias_heads=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_both_ways_are_dense_attention_on_snapped_tokens(sizes, group, kv_heads, share, bias_heads, dtype, scale, seed):
    batch, queries, keys, channels = sizes
    heads = group * kv_heads
    case = make_case(batch, heads, kv_heads, queries, keys, channels, share=share, dtype=dtype, seed=seed)
    bias = None
    if bias_heads:
        bias = torch.randn(1, heads if bias_heads == 2 else 1, keys, generator=torch.Generator().manual_seed(seed))
        bias[..., keys // 2 :: 3] = float("-inf")
    assert_within_rounding(collapsed_attention(*case, bias, scale=scale), case, bias, scale)
    assert_within_rounding(packed_attention(*case, bias, scale=scale), case, bias, scale)


def test_several_blocks():
    case = make_case(1, 2, 1, 300, 420, 32)
    assert_within_rounding(collapsed_attention(*case), case)
    assert_within_rounding(packed_attention(*case), case)


def test_it_equals_the_snapped_reference_to_1e_5():
    """Token granularity of TimeRipple: correlated tokens of a video, two thirds of which are reused."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 1, 2, 4, 8, 8, 32, generator=generator)
    fine = coarse.repeat_interleave(2, 3).repeat_interleave(2, 4).repeat_interleave(2, 5)
    query, key = (fine + 0.2 * torch.randn(fine.shape, generator=generator)).flatten(3, 5)
    value = torch.randn(query.shape, generator=generator)
    grid = {"frames": 8, "height": 16, "width": 16, "first": 0, "axes": [0, 1, 2], "window": 2}
    theta = torch.tensor([0.15])
    roots = [token_roots(x, theta, **grid) for x in (query, key)]
    assert all(0.5 < float((r != torch.arange(2048)).float().mean()) < 0.9 for r in roots)
    snapped = [snap_tokens(x, theta, [32], [1.0], granularity="token", **grid)[0] for x in (query, key)]
    expected = F.scaled_dot_product_attention(snapped[0], snapped[1], value)
    torch.testing.assert_close(collapsed_attention(query, key, value, *roots), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed_attention(query, key, value, *roots), expected, rtol=0, atol=1e-5)


def test_roots_of_themselves_are_dense_attention():
    query, key, value, *_ = make_case(2, 2, 2, 40, 40)
    own = torch.arange(40).int().expand(2, 2, -1)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(collapsed_attention(query, key, value, own, own), expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_gives_zero():
    case = make_case()
    bias = torch.full((1, 1, 70), float("-inf"))
    assert not collapsed_attention(*case, bias).any()
    assert not packed_attention(*case, bias).any()


def test_strides_empty_batches_and_inputs_left_alone():
    case = make_case(2)
    before = [t.clone() for t in case]
    expected = collapsed_attention(*case)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in case]
    assert torch.equal(collapsed_attention(*apart), expected)
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True))
    assert collapsed_attention(*(t[:0] for t in case)).shape == (0, 4, 50, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": torch.ones(1, 2, 6, 8, dtype=torch.float64)}, "got query of torch.float64"),
        ({"key": torch.ones(1, 2, 6, 8).half()}, "got key of torch.float16, expected torch.float32 as query has"),
        ({"query_root": torch.zeros(1, 2, 6)}, "got query_root of torch.float32, expected torch.int32"),
        ({"query_root": torch.zeros(1, 2, 5, dtype=torch.int32)}, r"got query_root of shape \[1, 2, 5\]"),
        ({"key_root": torch.zeros(1, 1, 6, dtype=torch.int32)}, r"got key_root of shape \[1, 1, 6\]"),
        ({"key_bias": torch.zeros(1, 3, 6)}, r"got key_bias of shape \[1, 3, 6\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_the_contract_does_not_hold(change, reason, device):
    good = {name: torch.ones(1, 2, 6, 8) for name in ("query", "key", "value")}
    good |= {name: torch.zeros(1, 2, 6, dtype=torch.int32) for name in ("query_root", "key_root")}
    arguments = {name: value.to(device) for name, value in {**good, **change}.items()}
    with pytest.raises(InvalidArgument, match=f"^collapsed_attention: {reason}"):
        collapsed_attention(**arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    torch.library.opcheck(collapsed_attention, make_case(dtype=dtype), {"scale": 0.5})


class _Attention(torch.nn.Module):
    def forward(self, *tensors):
        return collapsed_attention(*tensors)


def test_export_keeps_one_node_and_the_length_dynamic():
    queries, keys = torch.export.Dim("queries", min=2, max=500), torch.export.Dim("keys", min=2, max=500)
    shapes = (({2: queries}, {2: keys}, {2: keys}, {2: queries}, {2: keys}),)
    program = torch.export.export(_Attention(), make_case(), dynamic_shapes=shapes, strict=False)
    program = program.run_decompositions({})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [OPERATORS["collapsed_attention"].overload]
    longer = make_case(queries=33, keys=81)
    assert torch.equal(program.module()(*longer), collapsed_attention(*longer))


def test_without_triton_the_cpu_kernel_works_and_the_cuda_kernel_says_so():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from graphwright.kernels import collapsed_attention as module
        case = *torch.ones(3, 1, 1, 4, 8), *torch.zeros(2, 1, 1, 4, dtype=torch.int32)
        assert module.collapsed_attention(*case).shape == (1, 1, 4, 8)
        module._cuda(*case)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingKernel: graphwright::collapsed_attention has no kernel" in done.stderr
    assert "triton is not installed" in done.stderr


def test_other_devices_get_the_missing_kernel_error():
    with pytest.raises(MissingKernel, match="graphwright::collapsed_attention has no kernel for device 'cpu'"):
        module.collapsed_attention._init_fn(*make_case())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_the_gpu(dtype):
    case = make_case(1, 4, 2, 300, 420, 64, dtype=dtype)
    assert_within_rounding(collapsed_attention(*(t.cuda() for t in case)).cpu(), case)
