"""Every form of attention becomes the same canonical site; near misses are refused for the right reason."""

import pytest
import torch
from torch import nn
from torch.export import export
from torch.nn import functional as F

import graphwright as gw
from graphwright.passes.canonicalize import canonicalize
from graphwright.patterns.attention import find_attention
from graphwright.patterns.graph import GraphView
from graphwright.prepare import prepare
from tests.forms import FORMS, HEADS, SIZE, WIDTH, Block, Form, exported, offset
from tests.models import CACHE, captured_bloom, tiny_bloom, tokens


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_becomes_one_canonical_site(form: Form, dynamic: bool) -> None:
    program = exported(form, dynamic)
    x = torch.randn(2, 9 if dynamic else 6, WIDTH)
    expected = Block(form.attend, form.kv_heads).eval()(x)
    canonicalize(program)
    (site,) = find_attention(GraphView(program)).sites
    # A dynamic batch is not used here, so decomposed programs fold their heads too.
    assert (site.heads, site.kv_heads, site.head_dim) == (HEADS, form.kv_heads, SIZE)
    assert site.mask.kind == form.mask
    assert site.attention == "self"
    assert site.scale is None or site.scale == pytest.approx(SIZE**-0.5, rel=1e-6)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-6)
    left = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not left & {"aten.softmax.int", "aten._softmax.default", "aten.bmm.default", "aten.matmul.default"}


def _probabilities(q, k, v):
    weights = (q @ k.transpose(2, 3)).softmax(-1)
    return weights @ v + weights.sum() * 0


def _capped(q, k, v):
    return (torch.tanh(q @ k.transpose(2, 3) / 30) * 30).softmax(-1) @ v


def _twice(q, k, v):
    mask = torch.rand(q.shape[2], k.shape[2])
    return (q @ k.transpose(2, 3) + mask + mask.t()).softmax(-1) @ v


def _scaled_late(q, k, v):
    return ((q @ k.transpose(2, 3) + torch.rand(q.shape[2], k.shape[2])) * 0.3).softmax(-1) @ v


def _over_queries(q, k, v):
    return (q @ k.transpose(2, 3)).softmax(-2) @ v


def _elementwise(q, k, v):
    return (q + k).softmax(-1) * v


def _offset_by_half(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    addend = torch.arange(k.shape[1]).float()[None, None]
    return torch.baddbmm(addend, q, k.mT, beta=0.5).softmax(-1) @ v


def _offset_then_scaled(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return (torch.baddbmm(torch.arange(k.shape[1]).float()[None, None], q, k.mT) * 0.3).softmax(-1) @ v


NEAR_MISSES = [
    (_offset_by_half, "the offset of the scores has a factor (factor=0.5)"),
    (_offset_then_scaled, "the offset of the scores has a factor (factor=0.3)"),
    (_probabilities, "attention probabilities are used outside"),
    (_capped, "scores are not a scaled, masked matrix product"),
    (_twice, "scores are masked twice"),
    (_scaled_late, "scores are scaled after the mask"),
    (_over_queries, "softmax is not over the last"),
    (_elementwise, "scores are not a scaled, masked matrix product"),
]


@pytest.mark.parametrize(("attend", "reason"), NEAR_MISSES, ids=lambda value: getattr(value, "__name__", ""))
def test_near_misses_are_refused_with_their_reason(attend, reason) -> None:
    program = export(Block(attend).eval(), (torch.randn(2, 6, WIDTH),), strict=False).run_decompositions({})
    expected = program.module()(x := torch.randn(2, 6, WIDTH)) if "rand" not in attend.__code__.co_names else None
    canonicalize(program)
    found = find_attention(GraphView(program))
    assert not found.sites
    assert reason in str(found.nearest_miss)
    assert found.nearest_miss.source, "the refusal names the line of the model"
    if expected is not None:
        torch.testing.assert_close(program.module()(x), expected)


def test_a_row_that_masks_every_key_is_the_same_in_all_of_them() -> None:
    """As in the model: what is filled is filled after the offset, so keys that nobody sees weigh the same."""

    def masked(q, k, v):
        steep = 1000.0 * torch.arange(k.shape[2])  # in float32 a thousand is seen beside 1e9, and a product is not
        return offset(q, k, v, lambda q, k: steep, lambda scores, keep: scores.masked_fill(keep | keep.mT, -1e9))

    _check(masked)


def test_scores_of_three_dimensions_are_offset_and_masked_in_three() -> None:
    def folded(q, k, v):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] + 0.0, q, k.mT)
        keep = torch.arange(k.shape[1]) <= torch.arange(q.shape[1])[:, None]
        return (scores.masked_fill(~keep, -1e9).softmax(-1) @ v).unflatten(0, (2, HEADS))

    _check(folded)


def _check(attend) -> None:
    program = export(Block(attend).eval(), (x := torch.randn(2, 6, WIDTH),), strict=False).run_decompositions({})
    expected = program.module()(x)
    canonicalize(program)
    assert len(find_attention(GraphView(program)).sites) == 1
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-6)


def test_bloom_is_found_in_every_phase() -> None:
    captured = captured_bloom()
    prepared = prepare(captured)
    assert [phase.name for phase in prepared.phases] == ["decode", "prefill", "extend"]
    for name, sites in prepared.sites.items():
        assert [(site.heads, site.head_dim) for site in sites.attention] == [(4, 16)] * 2, name
        assert [(site.kv_heads, site.length) for site in sites.cache] == [(4, CACHE)] * 2, name
        assert [site.mask.kind for site in sites.attention] == ["cache_alibi"] * 2, name
        assert [site.mask.slopes for site in sites.attention] == [(2**-2, 2**-4, 2**-6, 2**-8)] * 2, name
        assert [site.reads for site in sites.cache] == ["new" if name == "prefill" else "cache"] * 2
        assert not sites.refusals["attention"]
    program = gw.optimize(captured, progress=False)
    ids = tokens(20)
    with torch.no_grad():
        expected = tiny_bloom()(ids).logits
    found = torch.cat(
        [
            program(ids[:, :9], torch.arange(9)),
            program(ids[:, 9:19], torch.arange(9, 19)),
            program(ids[:, 19:], torch.arange(19, 20)),
        ],
        1,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tiled_heads_are_not_taken_for_grouped_ones() -> None:
    def tiled(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    program = export(Block(tiled, 2).eval(), (torch.randn(1, 6, WIDTH),), strict=False).run_decompositions({})
    canonicalize(program)
    (site,) = find_attention(GraphView(program)).sites
    assert site.kv_heads == HEADS


def test_cross_attention_is_told_from_self_attention() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, x, text):
            q = self.q(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            k, v = self.kv(text).unflatten(-1, (2, HEADS, SIZE)).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v)

    args = (torch.randn(1, 6, WIDTH), torch.randn(1, 6, WIDTH))
    program = export(Cross().eval(), args, strict=False).run_decompositions({})
    canonicalize(program)
    (site,) = find_attention(GraphView(program)).sites
    assert site.attention == "cross"
