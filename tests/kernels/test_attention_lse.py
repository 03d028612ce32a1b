"""Attention with the logarithms of its sums: against float64, bit for bit against aten, at the edges, refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import attention_lse as module
from graphwright.kernels.attention_lse import attention_lse, reference
from graphwright.kernels.contract import FLOATS, OPERATORS


def make_case(batch=1, heads=4, kv_heads=2, queries=50, keys=70, channels=16, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, channels, generator=generator).to(dtype)
    key, value = torch.randn(2, batch, kv_heads, keys, channels, generator=generator).to(dtype)
    return query, key, value


def assert_within_rounding(found, case, scale=None):
    """A score is a sum of D products in float32, its exponential twice as wrong; the sums have M terms."""
    query, key, value = case
    exact, exact_lse = reference(*(t.double() for t in case), scale=scale)
    output, lse = found
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = float((query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax()) * factor)
    half_ulp = torch.finfo(torch.float32).eps / 2
    rounding = half_ulp * (2 * (query.shape[-1] + 4) * scores + key.shape[2])
    assert (output.dtype, lse.dtype) == (query.dtype, torch.float32)
    largest = float(value.double().abs().max())
    assert float((output.double() - exact).abs().max()) <= (rounding + 2 * torch.finfo(query.dtype).eps) * largest
    # For 16 bits aten takes a quicker exponential, right to an eighth of what float16 can tell.
    quick = 0.0 if query.dtype == torch.float32 else 2.0**-13
    assert float((lse.double() - exact_lse).abs().max()) <= rounding + 4 * half_ulp * max(1.0, scores) + quick


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 90), st.integers(1, 90), st.integers(1, 40)),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_kernel_and_reference_are_within_rounding(sizes, group, kv_heads, dtype, scale, seed):
    batch, queries, keys, channels = sizes
    case = make_case(batch, group * kv_heads, kv_heads, queries, keys, channels, dtype=dtype, seed=seed)
    assert_within_rounding(attention_lse(*case, scale=scale), case, scale)
    assert_within_rounding(reference(*case, scale=scale), case, scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_output_has_the_bits_of_atens_own(dtype):
    query, key, value = make_case(2, 4, 4, 300, 300, 64, dtype=dtype)
    expected = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(attention_lse(query, key, value)[0], expected)
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    assert torch.equal(attention_lse(query, key, value)[0], F.scaled_dot_product_attention(query, key, value))


def test_no_queries():
    query, key, value = make_case()
    output, lse = attention_lse(query[:, :, :0], key, value)
    assert output.shape == (1, 4, 0, 16)
    assert lse.shape == (1, 4, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": torch.ones(1, 2, 6, 8, dtype=torch.float64)}, "got query of torch.float64"),
        ({"key": torch.ones(1, 2, 6, 8).half()}, "got key of torch.float16, expected torch.float32 as query has"),
        ({"value": torch.ones(1, 2, 5, 8)}, r"got value of shape \[1, 2, 5, 8\]"),
        ({"query": torch.ones(1, 3, 6, 8)}, "got H=3 in query, expected a multiple of G=2"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_the_contract_does_not_hold(change, reason, device):
    good = {name: torch.ones(1, 2, 6, 8) for name in ("query", "key", "value")}
    arguments = {name: value.to(device) for name, value in {**good, **change}.items()}
    with pytest.raises(InvalidArgument, match=f"^attention_lse: {reason}"):
        attention_lse(**arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    torch.library.opcheck(attention_lse, make_case(dtype=dtype), {"scale": 0.5})


class _Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return attention_lse(query, key, value)


def test_export_keeps_one_node_and_the_lengths_dynamic():
    queries, keys = torch.export.Dim("queries", min=2, max=500), torch.export.Dim("keys", min=2, max=500)
    shapes = {"query": {2: queries}, "key": {2: keys}, "value": {2: keys}}
    program = torch.export.export(_Attention(), make_case(), dynamic_shapes=shapes, strict=False)
    program = program.run_decompositions({})
    ours = [node.target for node in program.graph.nodes if "graphwright" in str(node.target)]
    assert ours == [OPERATORS["attention_lse"].overload]
    longer = make_case(queries=33, keys=81)
    for got, wanted in zip(program.module()(*longer), attention_lse(*longer), strict=True):
        assert torch.equal(got, wanted)


def test_other_devices_get_the_missing_kernel_error():
    with pytest.raises(MissingKernel, match="graphwright::attention_lse has no kernel for device 'cpu'"):
        module.attention_lse._init_fn(*make_case())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [64, 20])
def test_on_the_gpu(dtype, channels):
    case = make_case(1, 4, 2, 300, 420, channels, dtype=dtype)
    found = attention_lse(*(t.cuda() for t in case))
    assert_within_rounding(tuple(t.cpu() for t in found), case)
