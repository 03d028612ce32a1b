"""Packing: what goes in comes out within half a step, and the planes hold what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InvalidArgument
from graphwright.kernels.packed_cache import BITS, GROUP, Packing, dequantize, pack, quantize, round_trip, unpack

FORMS = ("per_token", "per_channel", "per_group")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(bits=st.sampled_from(BITS), tokens=st.integers(0, 5), dim=st.sampled_from((8, 24, 64)), seed=st.integers(0, 99))
def test_pack_and_unpack_agree(bits, tokens, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, tokens, dim), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (2, tokens, dim * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def half_steps(x: torch.Tensor, bits: int, form: str) -> torch.Tensor:
    """The bound that the docstring gives, for each value of x [T, D]."""
    if form == "per_channel":
        groups = x.unflatten(0, (-1, GROUP))
        low, high = groups.amin(1, True).expand_as(groups), groups.amax(1, True).expand_as(groups)
    else:
        groups = x.unflatten(1, (-1, GROUP if form == "per_group" else x.shape[1]))
        low, high = groups.amin(-1, True).expand_as(groups), groups.amax(-1, True).expand_as(groups)
    span = (high - low).reshape(x.shape).clamp_min(1e-5)
    largest = torch.maximum(low.abs(), high.abs()).reshape(x.shape)
    return span / (2**bits - 1) / 2 + 2**-11 * (largest + span)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_values_come_back_within_half_a_step(bits, form):
    torch.manual_seed(0)
    x = torch.randn(64, 64) * torch.logspace(-3, 2, 64)
    packing = Packing(bits, form, 64)
    back = dequantize(*quantize(x, packing), packing)
    excess = (back - x).abs() / half_steps(x, bits, form)
    assert excess.max() <= 1
    assert excess.max() > 0.3, "the bound is near what happens, so a coarser quantizer would break it"


@pytest.mark.parametrize("form", FORMS)
def test_constants_and_zeros_come_back(form):
    x = torch.zeros(32, 32)
    x[:, 3] = 20.003
    packing = Packing(4, form, 32)
    assert torch.equal(dequantize(*quantize(torch.zeros(32, 32), packing), packing), torch.zeros(32, 32))
    back = dequantize(*quantize(torch.full((32, 32), 20.003), packing), packing)
    torch.testing.assert_close(back, torch.full((32, 32), 20.003), rtol=2**-11, atol=0)
    if form == "per_channel":
        torch.testing.assert_close(dequantize(*quantize(x, packing), packing), x, rtol=2**-11, atol=1e-6)


def test_keys_with_an_outlier_channel_are_better_by_channel():
    torch.manual_seed(0)
    keys = torch.randn(65, 64)
    keys[:, 7] += 30
    error = {form: float((round_trip(keys, 4, form) - keys)[:64].norm()) for form in ("per_token", "per_channel")}
    assert error["per_channel"] < 0.2 * error["per_token"]


def test_nan_stays_in_its_group():
    x = torch.randn(2, 64)
    x[0, 5] = float("nan")
    back = round_trip(x, 4, "per_token")
    assert back[0].isnan().all()
    assert back[1].isfinite().all()


@pytest.mark.parametrize(
    ("bits", "form", "dim", "tokens", "expected"),
    [
        (4, "per_token", 64, 100, 100 * (32 + 4)),
        (8, "per_token", 128, 3, 3 * (128 + 4)),
        (2, "per_channel", 64, 33, 64 * 16 + 2 * 64 * 4 + 32 * 64 * 2),
        (4, "per_group", 64, 64, 64 * (32 + 8) + 32 * 64 * 2),
    ],
)
def test_bytes(bits, form, dim, tokens, expected):
    packing = Packing(bits, form, dim)
    assert packing.bytes_for(tokens) == expected
    assert packing.capacity(expected) >= tokens
    with pytest.raises(InvalidArgument, match="no whole number of tokens"):
        packing.capacity(expected + 1)


@pytest.mark.parametrize("form", FORMS)
def test_planes_are_views_that_do_not_overlap(form):
    packing = Packing(2, form, 32)
    store = torch.zeros(2, 3, packing.bytes_for(64), dtype=torch.uint8)
    planes = packing.planes(store)
    for plane in planes:
        if plane is not None:
            plane.view(torch.uint8).add_(1)
    assert torch.equal(store, torch.ones_like(store)), "every byte belongs to one plane"


def test_four_bits_with_metadata_are_less_than_three_tenths_of_float16():
    assert Packing(4, "per_token", 64).bytes_for(4096) / (4096 * 64 * 2) <= 0.30


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((3, "per_token", 64), "got 3 bits, expected one of 8, 4, 2"),
        ((16, "per_token", 64), "got 16 bits"),
        ((4, "per_head", 64), "got form 'per_head'"),
        ((4, "per_token", 12), "got head_dim 12, expected a multiple of 8"),
        ((4, "per_group", 48), "got head_dim 48, expected a multiple of 32"),
    ],
)
def test_what_cannot_be_is_refused(arguments, reason):
    with pytest.raises(InvalidArgument, match=reason):
        Packing(*arguments).require()
