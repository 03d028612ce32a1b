"""Paged caches, decoded: every way equals the oracle, at every tau; what moves; where a conversation may go on."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from graphwright.errors import InvalidArgument
from graphwright.kernels.page_tables import Count
from tests.kernels.paged_decoding import OPS, Decoding, text

# float32: sums of 16 products and of 48 weights, each term of order one.
ATOL = 48 * 2**-23
STARTS = torch.tensor([0, 13])


@pytest.mark.parametrize("way", ["reference", "functional", "in_place", "file", "one buffer"])
@pytest.mark.parametrize("tau", [-1.0, 0.7, 0.85, 2.0])
@pytest.mark.parametrize("starts", [None, STARTS])
def test_decoding_equals_the_oracle(way, tau, starts):
    given = text(tau=tau, starts=starts, length=96 if way == "reference" else 128)
    files = {"file": {"file": True}, "one buffer": {"file": True, "buffers": 1}}
    decoding = Decoding(given, "in_place" if way in files else way, **files.get(way, {}))
    # The oracle's first decoded token knows the prompt's last query, as decoding does.
    torch.testing.assert_close(decoding.run(50), given.oracle()[:, :, 50:], rtol=0, atol=ATOL)
    counts = decoding.state["counts"]
    share = float(counts[Count.CORRECTED] / counts[Count.HEADS])
    assert share == {-1.0: 0.0, 2.0: 1.0}.get(tau, share)
    assert 0 < share < 1 or tau in (-1.0, 2.0)
    key, value = decoding.gathered(given.length - 1)
    assert torch.equal(key, given.key)
    assert torch.equal(value, given.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    given = text(tau=0.8)
    given.query, given.key, given.value = (x.to(dtype) for x in (given.query, given.key, given.value))
    found, wanted = Decoding(given, "in_place", file=True).run(50), given.oracle()[:, :, 50:]
    # Both round weights or values and the result once; weights are at most one and their sum is.
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * torch.finfo(dtype).eps * float(given.value.abs().max()))


def test_a_budget_of_the_whole_text_is_dense_attention():
    given = text(slots=16)
    dense = scaled_dot_product_attention(given.query, given.key, given.value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(given.oracle(), dense)
    torch.testing.assert_close(Decoding(given, "in_place").run(30), dense[:, :, 30:], rtol=0, atol=3 * ATOL)


def test_more_correction_means_less_error():
    dense = text(slots=16).oracle()
    errors = [float((text(tau=tau).oracle() - dense).norm()) for tau in (-1.0, 0.75, 0.85, 2.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.02 * errors[-1]


@pytest.mark.parametrize("way", ["reference", "functional", "in_place"])
def test_pieces_leave_the_cache_that_single_tokens_leave(way):
    given = text(length=64)
    at_once, pieces, single = (Decoding(given, way) for _ in range(3))
    at_once.append(0, 60)
    for low, high in ((0, 5), (5, 8), (8, 31), (31, 60)):
        pieces.append(low, high)
    for i in range(60):
        single.append(i, i + 1)
    for decoding in (at_once, pieces, single):
        key, value = decoding.gathered(59)
        assert torch.equal(key[:, :, :60], given.key[:, :, :60])
        assert torch.equal(value[:, :, :60], given.value[:, :, :60])
        assert torch.equal(decoding.state["summary"], single.state["summary"])
        inverse = decoding.state["tables"][..., given.slots :]
        assert (inverse[..., [0, 6, 7]] >= 0).all(), "sinks and recent pages are at hand"
        assert decoding.state["counts"][Count.WRITTEN] == 60


def test_only_missing_pages_move_and_bytes_are_counted():
    given = text(tau=-1.0)
    decoding = Decoding(given)
    decoding.several(0, 50)
    for i in range(50, 80):
        inverse = decoding.state["tables"][..., given.slots :].clone()
        before = decoding.state["counts"].clone()
        decoding.step(i)
        new = (inverse < 0) & (decoding.state["tables"][..., given.slots :] >= 0)
        new[..., (i + 1) // given.page] = False  # it is still to be written
        moved = decoding.state["counts"] - before
        assert moved[Count.MOVED] == new.sum()
        assert moved[Count.CHOSEN] - moved[Count.HIT] <= moved[Count.MOVED]
        assert moved[Count.BYTES] == new.sum() * 2 * given.page * 16 * 4
    assert decoding.state["counts"][Count.MOVED] > 0


def test_a_conversation_may_go_back_and_start_again():
    given = text()
    decoding = Decoding(given, "in_place", file=True)
    first = decoding.run(50)
    decoding.step(127)
    for start in (100, 64, 50):  # further back than what is at hand
        given.tau = 2.0  # a step out of order has no previous query
        wanted = given.oracle()
        again = torch.cat([decoding.step(i) for i in range(start, 128)], 2)
        torch.testing.assert_close(again, wanted[:, :, start:], rtol=0, atol=ATOL)
    given.tau = 0.8
    torch.testing.assert_close(decoding.run(50), first, rtol=0, atol=ATOL)


def test_what_does_not_fit_is_refused():
    given = text(length=64)
    decoding = Decoding(given)
    state = [decoding.state[name] for name in ("fast", "slow", "summary", "tables", "counts")]
    new = given.key[:, :, :1]
    for operator in (OPS.page_append, OPS.page_append_):
        with pytest.raises(InvalidArgument, match="positions 64 to 64 do not fit a slow pool of 64 tokens"):
            operator(*state, torch.tensor([64]), new, new, None, 1, 2)
    with pytest.raises(InvalidArgument, match="leave none to choose"):
        OPS.page_append(*state, torch.tensor([0]), new, new, None, 3, 3)
    with pytest.raises(InvalidArgument, match="expected 6 slots and 8 pages"):
        OPS.page_append(*state[:3], state[3][..., :-1], state[4], torch.tensor([0]), new, new, None, 1, 2)
    with pytest.raises(InvalidArgument, match=r"got key of shape \[2, 2, 1, 8\]"):
        OPS.page_append(*state, torch.tensor([0]), new[..., :8], new[..., :8], None, 1, 2)
    given.pooling = "median"
    with pytest.raises(InvalidArgument, match="got pooling 'median', expected one of mean_softmax"):
        decoding.recall(0, 1, ahead=True)
    with pytest.raises(InvalidArgument, match=r"paged_attention: got .*=2"):
        OPS.paged_attention(given.query[:, :, :2], state[0], state[3], torch.arange(2), None, 1.0)


def test_shapes_are_known_without_data():
    given = text(length=64)
    meta = {name: tensor.to("meta") for name, tensor in Decoding(given).state.items()}
    names = ("fast", "slow", "summary", "tables", "counts")
    one, new = torch.zeros(1, dtype=torch.int64, device="meta"), given.key[:, :, :1].to("meta")
    appended = OPS.page_append(*(meta[name] for name in names), one, new, new, None, 1, 2)
    assert [tensor.shape for tensor in appended] == [meta[name].shape for name in names]
    y = OPS.paged_attention(given.query[:, :, :1].to("meta"), meta["fast"], meta["tables"], one, None, 1.0)
    assert y.shape == (2, 4, 1, 16)
