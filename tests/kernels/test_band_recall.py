"""The operator on the CPU: against an oracle in float64, at the edges, refused, exported, and its cost."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from graphwright.errors import InvalidArgument, MissingKernel
from graphwright.kernels import band_recall as module
from graphwright.kernels.band_recall import band_recall, recall_flops, reference
from graphwright.kernels.contract import FLOATS, OPERATORS


def make_case(batch, heads, length, head_dim, *, dtype=torch.float32, widths=(0, 1, 5, 40), magnitude=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, heads, length, head_dim, generator=generator) * magnitude
    return query.to(dtype), key.to(dtype), torch.tensor(widths, dtype=torch.int32)


def assert_within_rounding(recall, query, key, widths, scale=None):
    """Assert that ``recall`` is the exact one up to float32 rounding of the scores and of the sums.

    A score is a sum of D products times a scale: D + 2 roundings of the sum of magnitudes, plus two of itself for the
    change of base and the difference to the row's maximum. The exponential of that error changes a recall by at most
    half of it. Then come sums of shares: L of them in a row, and again L rows.
    """
    length, head_dim = query.shape[2:]
    scale = head_dim**-0.5 if scale is None else scale
    q, k = query.double() * scale, key.double()
    scores = q @ k.mT
    places = torch.arange(length)
    band = ((places[:, None] - places).abs() <= widths[:, None, None]).double()
    exact = torch.einsum("bhij,wij->bhw", scores.softmax(-1), band) / length
    magnitudes = float((q.abs() @ k.abs().mT).amax())
    half_ulp = torch.finfo(torch.float32).eps / 2
    bound = half_ulp * ((head_dim + 4) * magnitudes / 2 + 2 * length + 8)
    assert recall.dtype == torch.float32
    assert recall.shape == exact.shape
    assert float((recall.double() - exact).abs().max()) <= bound


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 130), st.integers(1, 80)),
    widths=st.lists(st.integers(-2, 140), max_size=5),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.sampled_from([0.1, 1.0, 3.0]),
    scale=st.sampled_from([None, 0.3]),
    slab=st.sampled_from([1, 50, 3000, 1 << 20]),
    seed=st.integers(0, 2**31),
)
def test_kernel_and_reference_agree_with_the_exact_recall(sizes, widths, dtype, magnitude, scale, slab, seed):
    case = make_case(*sizes, dtype=dtype, widths=widths, magnitude=magnitude, seed=seed)
    if not widths:
        assert band_recall(*case).shape == (*sizes[:2], 0)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLAB", slab)  # rows and heads at once: every way of cutting the maps
        assert_within_rounding(band_recall(*case, scale=scale), *case, scale)
    assert_within_rounding(reference(*case, scale=scale), *case, scale)


def test_a_longer_map_than_the_slab():
    case = make_case(1, 2, 1500, 24, widths=(3, 700))
    assert_within_rounding(band_recall(*case), *case)


def test_known_recalls():
    """Equal scores: the share of the map that the band covers; keys that only their own query finds: all of it."""
    length = 40
    query, key, widths = make_case(1, 2, length, 64, widths=(-1, 0, 9, 39, 1000))
    flat = band_recall(torch.zeros_like(query), key, widths)
    places = torch.arange(length)
    covered = [float(((places[:, None] - places).abs() <= width).double().mean()) for width in widths]
    torch.testing.assert_close(flat, torch.tensor(covered).expand(1, 2, -1), atol=1e-6, rtol=0)
    alone = torch.eye(length, 64).expand(1, 2, -1, -1) * 100
    torch.testing.assert_close(band_recall(alone, alone, widths), torch.tensor([0.0, 1, 1, 1, 1]).expand(1, 2, -1))


def test_recall_grows_with_the_width_up_to_one():
    query, key, _ = make_case(2, 2, 90, 16, magnitude=2.0)
    recall = band_recall(query, key, torch.arange(90, dtype=torch.int32))
    assert (recall.diff() > -1e-6).all()
    torch.testing.assert_close(recall[..., -1], torch.ones(2, 2), atol=2e-5, rtol=0)


def test_a_nan_stays_in_its_head():
    query, key, widths = make_case(2, 3, 20, 16)
    query[0, 1, 3, 2] = float("nan")
    for operator in (band_recall, reference):
        bad = operator(query, key, widths).isnan()
        assert bad[0, 1].all()
        assert bad.sum() == len(widths)


def test_any_strides_and_inputs_left_alone():
    query, key, widths = make_case(2, 3, 50, 16)
    before = query.clone(), key.clone(), widths.clone()
    expected = band_recall(query, key, widths)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key)]
    assert torch.equal(band_recall(*apart, widths), expected)
    assert torch.equal(band_recall(query.mT.contiguous().mT, key, widths.flip(0).contiguous().flip(0)), expected)
    assert torch.equal(band_recall(query[:, :1].expand(-1, 3, -1, -1), key, widths)[:, 0], expected[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(before, (query, key, widths), strict=True))
    assert band_recall(query[:0], key[:0], widths).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": torch.ones(1, 2, 6, 8, dtype=torch.float64)}, "got query of torch.float64"),
        ({"query": torch.ones(2, 6, 8)}, r"got query of shape \[2, 6, 8\], expected \[B H L D\]"),
        ({"key": torch.ones(1, 2, 5, 8)}, r"got key of shape \[1, 2, 5, 8\], expected \[B H L D\] with L=6 of query"),
        ({"key": torch.ones(1, 2, 6, 8).half()}, "got key of torch.float16, expected torch.float32 as query has"),
        ({"widths": torch.ones(3)}, "got widths of torch.float32, expected torch.int32"),
        ({"widths": torch.ones(3, 1, dtype=torch.int32)}, r"got widths of shape \[3, 1\], expected \[W\]"),
        ({name: torch.ones(1, 2, 0, 8) for name in ("query", "key")}, "got L=0 in query, expected at least 1"),
        ({name: torch.ones(1, 2, 6, 257) for name in ("query", "key")}, "got D=257 in query, expected at most 256"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_what_the_contract_does_not_hold(change, reason, device):
    good = {"query": torch.ones(1, 2, 6, 8), "key": torch.ones(1, 2, 6, 8), "widths": torch.ones(3, dtype=torch.int32)}
    arguments = {name: value.to(device) for name, value in {**good, **change}.items()}
    with pytest.raises(InvalidArgument, match=f"^band_recall: {reason}"):
        band_recall(**arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    torch.library.opcheck(band_recall, make_case(2, 2, 9, 8, dtype=dtype), {"scale": 0.5})


class _Recall(torch.nn.Module):
    def forward(self, query, key, widths):
        return band_recall(query, key, widths)


def test_export_keeps_one_node_and_every_size_dynamic():
    auto = torch.export.Dim.AUTO
    shapes = {"query": dict.fromkeys(range(4), auto), "key": dict.fromkeys(range(4), auto), "widths": {0: auto}}
    program = torch.export.export(_Recall(), make_case(2, 3, 9, 8), dynamic_shapes=shapes, strict=False)
    program = program.run_decompositions({})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [OPERATORS["band_recall"].overload]
    for sizes in ((3, 2, 17, 16), (2, 5, 4, 24)):
        case = make_case(*sizes, widths=(1, 2, 30))
        assert torch.equal(program.module()(*case), band_recall(*case))


@pytest.mark.parametrize(("frames", "length"), [(8, 16 * 16), (33, 48 * 80)])
def test_its_products_are_two_l_squared_d_flops(frames, length):
    """So ARM's two samples of L tokens cost 2 / (T - 1)^2 of the score map of the (T - 1) L tokens that it judges."""
    head_dim = 64
    case = make_case(2, 1, length, head_dim, widths=(1,))
    with FlopCounterMode(display=False) as counted:
        module._cpu(*case)
    tokens = (frames - 1) * length
    with FlopCounterMode(display=False) as dense:
        torch.empty(1, tokens, head_dim, device="meta") @ torch.empty(1, head_dim, tokens, device="meta")
    share = 2 / (frames - 1) ** 2
    assert counted.get_total_flops() / dense.get_total_flops() == pytest.approx(share, rel=1e-9)
    softmax = 4 * length**2
    assert 2 * (recall_flops(length, head_dim, widths=0) - softmax) == counted.get_total_flops()


def test_without_triton_the_cpu_kernel_works_and_the_cuda_kernel_says_so():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from graphwright.kernels import band_recall as module
        case = torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), torch.ones(3, dtype=torch.int32)
        assert module.band_recall(*case).shape == (1, 1, 3)
        module._cuda(*case)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingKernel: graphwright::band_recall has no kernel" in done.stderr
    assert "triton is not installed" in done.stderr


def test_other_devices_get_the_missing_kernel_error():
    with pytest.raises(MissingKernel, match="graphwright::band_recall has no kernel for device 'cpu'"):
        module.band_recall._init_fn(*make_case(1, 1, 4, 4))
