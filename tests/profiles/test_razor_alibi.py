"""RazorAttention on a model with ALiBi: heads by reach, an error that eps bounds, fewer bytes, replay, refusals."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.prepare import prepare
from graphwright.profiles.alibi_reach import head_reach
from tests.models import tiny_bloom, tokens

LENGTH = 100
WINDOW = 60  # the first head of four sees 54 tokens back with the default eps
HEADS, SIZE = 4, 16


def model() -> Any:
    """One layer without an MLP, so that what attention gets wrong can be followed to the logits."""
    made = tiny_bloom(n_layer=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        made.transformer.h[0].mlp.dense_4h_to_h.weight.zero_()
        qkv = made.transformer.h[0].self_attention.query_key_value
        qkv.bias.copy_(0.1 * torch.randn(qkv.bias.shape, generator=generator))
        qkv.weight.mul_(2)
    return made


@cache
def captured() -> gw.Captured:
    return gw.capture_causal_lm(model(), LENGTH)


def razored(**options: Any) -> gw.Program:
    return gw.optimize(captured(), methods=[gw.RazorAttention(**{"ratio": 1e9} | options)], progress=False)


@cache
def full() -> gw.Program:
    return gw.optimize(captured(), progress=False)


@cache
def reach(eps: float) -> tuple[float, ...]:
    prepared = prepare(captured())
    return head_reach(prepared.exported["decode"], prepared.sites["decode"].cache, eps)[0].reach


def steps(program: gw.Program, ids: Tensor) -> Tensor:
    """Logits token by token."""
    program.reset()
    return torch.cat([program(ids[:, i : i + 1], torch.tensor([i])) for i in range(ids.shape[1])], 1)


def most_that_logits_move(masses: list[float], ids: Tensor) -> float:
    """What follows for logits where a head loses such a mass, for one layer without an MLP.

    A head that loses the mass p of its weights is off by at most 2 p max |v|, so the residual stream by that times the
    norm of the head's part of the output projection. A norm of gain 1 turns a step of d into one of at most d / sigma,
    with the least standard deviation on the way, and logits are products with rows of the embedding.
    """
    bloom = model()
    block = bloom.transformer.h[0].requires_grad_(False)
    seen: dict[str, Tensor] = {}
    block.self_attention.query_key_value.register_forward_hook(lambda m, a, y: seen.update(qkv=y))
    bloom.transformer.ln_f.register_forward_pre_hook(lambda m, a: seen.update(last=a[0]))
    with torch.no_grad():
        bloom(ids)
    values = seen["qkv"].view(1, -1, HEADS, 3, SIZE)[0, :, :, 2].norm(dim=-1).amax(0)
    out = block.self_attention.dense.weight.view(-1, HEADS, SIZE)
    norms = [float(torch.linalg.matrix_norm(out[:, head], ord=2)) for head in range(HEADS)]
    step = sum(2 * p * float(v) * n for p, v, n in zip(masses, values, norms, strict=True))
    sigma = float(seen["last"].std(-1, correction=0).min()) - step / seen["last"].shape[-1] ** 0.5
    assert sigma > 0
    return float(bloom.lm_head.weight.detach().norm(dim=-1).max()) * step / sigma


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3])
def test_the_error_is_what_eps_allows(eps: float):
    window, ids = math.ceil(reach(eps)[0]), tokens(LENGTH)
    program = razored(window=window, eps=eps, sinks=0)
    assert {d.status for d in program.decisions} == {"kept"}, program.decisions
    assert program.decisions[0].options == {"keep": [1, 2, 3], "sinks": 0, "window": window, "compensate": False}
    masses = [eps / (1 - math.exp(-0.25)), 0.0, 0.0, 0.0]
    error = float((steps(program, ids) - steps(full(), ids)).abs().max())
    # float32: logits are below 1, and decoding in two parts sums in another order.
    assert error <= most_that_logits_move(masses, ids) + 1e-6


def test_what_is_nearer_than_the_reach_matters():
    """The bound is not idle: with a window of a few tokens the same head breaks it."""
    ids = tokens(LENGTH)
    near = razored(window=3, heads=((1, 2, 3),), sinks=0)
    error = float((steps(near, ids) - steps(full(), ids)).abs().max())
    assert error > 2 * most_that_logits_move([1e-3 / (1 - math.exp(-0.25)), 0.0, 0.0, 0.0], ids)


def test_heads_are_chosen_by_reach_and_recorded():
    far = reach(1e-3)
    assert list(far) == sorted(far)
    assert far[1] > 3 * far[0]
    between = math.ceil(far[0])
    for window, keep in ((between - 1, None), (between, [1, 2, 3])):
        program = razored(window=window)
        decision = program.decisions[0]
        if keep is None:
            assert decision.status == "refused"
            assert decision.reason == (
                f"all heads of the layer see further back than {window} tokens, the nearest {far[0]:.0f}; give a larger"
                " window or eps"
            )
            assert program.state_bytes() == full().state_bytes()
        else:
            assert decision.options["keep"] == keep
            assert decision.facts["reach"] == ", ".join(f"{tokens:.0f}" for tokens in far)
            record = program.profile.measured["razor"]
            assert record == {"kept": [keep], "reach": [list(far)], "slopes": [[2**-2, 2**-4, 2**-6, 2**-8]]}
    assert razored(window=between, margin=1).decisions[0].status == "refused"


def test_bytes_are_fewer():
    program = razored(window=WINDOW)
    a_token = 2 * SIZE * 4
    assert full().state_bytes() == HEADS * LENGTH * a_token
    assert program.state_bytes() == (3 * LENGTH + 1 + 4 + WINDOW) * a_token
    text = str(program.report())
    assert f"first 4, last {WINDOW}" in text
    assert "mean" not in text.split("split cache: heads by layer")[1].split("packed")[1].splitlines()[2]
    assert "3 of 4 heads keep every token" in text


def test_a_profile_replays(tmp_path):
    program = razored(window=WINDOW)
    assert {d.status for d in program.decisions} == {"kept"}
    program.profile.save(tmp_path / "razor.json")
    again = gw.optimize(captured(), profile=tmp_path / "razor.json", progress=False)
    assert again.state_bytes() == program.state_bytes()
    ids = tokens(LENGTH, 5)
    assert torch.equal(steps(again, ids), steps(program, ids))


def test_given_heads_have_no_mean_either():
    program = razored(window=WINDOW, heads=((0, 3),))
    assert {d.status for d in program.decisions} == {"kept"}
    assert program.decisions[0].options == {"keep": [0, 3], "sinks": 4, "window": WINDOW, "compensate": False}
    whole = razored(window=WINDOW, heads=((0, 1, 2, 3),))
    assert whole.decisions[0].reason == "all heads of the layer are to keep every token"
    assert "razor" not in program.profile.measured


def test_where_nothing_is_proved_every_token_is_kept():
    """Without a norm in front weights do not say how large a score may be."""
    made = model()
    made.transformer.h[0].input_layernorm = torch.nn.Tanh()
    program = gw.optimize(
        gw.capture_causal_lm(made, 64), methods=[gw.RazorAttention(window=40, ratio=1e9)], progress=False
    )
    assert {d.status for d in program.decisions} == {"refused"}
    assert program.decisions[0].reason == (
        "how far back the layer's heads see is not known: queries and keys are not projected from one normalised"
        " hidden state"
    )
    assert program.profile.measured["razor"]["reach"] == [[None] * 4]


def test_padded_sequences_are_what_they_are_alone():
    bloom = tiny_bloom()
    razor = gw.RazorAttention(window=40, ratio=1e9)
    both, one = (
        gw.optimize(gw.capture_causal_lm(bloom, 96, *rest, padding=bool(rest)), methods=[razor], progress=False)
        for rest in ((2,), ())
    )
    assert {d.status for d in both.decisions} == {"kept"}, both.decisions
    assert one.decisions[0].options["keep"] == [1, 2, 3]
    first, second = tokens(90), tokens(71, 1)
    starts = torch.tensor([0, 19])
    ids = torch.cat([first, torch.cat([torch.zeros(1, 19, dtype=torch.int64), second], 1)])
    pieces = [slice(0, 30), *(slice(i, i + 1) for i in range(30, 90))]
    together = torch.cat([both(ids[:, piece], torch.arange(90)[piece], starts) for piece in pieces], 1)
    for row, alone, start in ((0, first, 0), (1, second, 19)):
        wanted = steps(one, alone)
        # A prefill sees everything, a decoded token what its heads keep: the same up to eps, which is 1e-3.
        torch.testing.assert_close(together[row : row + 1, start:], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"eps": 0}, "eps: Input should be greater than 0"), ({"margin": -1}, "margin: Input should be greater")],
)
def test_wrong_options(options, reason):
    with pytest.raises(gw.GraphwrightError, match=reason):
        gw.RazorAttention(**options)


def test_the_published_settings_are_the_defaults():
    assert (gw.RazorAttention().eps, gw.RazorAttention().margin) == (1e-3, 0)
