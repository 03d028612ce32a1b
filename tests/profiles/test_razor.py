"""RazorAttention: which heads are chosen, what becomes of them, replay, together with other methods, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument, StaleProfile
from graphwright.html_report.method_pictures import retrieval_heads
from graphwright.profiles.decode_loss import decoded_logits
from graphwright.profiles.razor import choose_heads
from graphwright.profiles.retrieval_heads import HeadScores
from tests.models import CACHE, Mlp, captured_llama, tiny_llama, tokens
from tests.new_process import assert_replays


def optimized(*others: gw.Method, **options: Any) -> gw.Program:
    razor = gw.RazorAttention(**{"window": 6, "ratio": 8, "sinks": 2, "induction": 0.25} | options)
    methods = [*others, razor]
    return gw.optimize(captured_llama(), methods=methods, calibration=[tokens(16)], progress=False)


@pytest.fixture(scope="module")
def razored() -> gw.Program:
    return optimized()


def test_the_best_heads_of_all_layers_are_chosen():
    scores = [
        HeadScores("a", (0.9, 0.1, 0.3), (0.0, 0.0, 0.1)),
        HeadScores("b", (0.2, 0.8, 0.7), (0.0, 0.0, 0.0)),
        HeadScores("c", (0.0, 0.0, 0.0), (0.5, 0.0, 0.0)),
    ]
    assert choose_heads(scores, 0.34, 0.0) == {"a": (0,), "b": (1, 2), "c": ()}
    assert choose_heads(scores, 0.11, 0.23) == {"a": (0, 2), "b": (), "c": (0,)}
    assert choose_heads(scores, 0.0, 0.0) == {"a": (), "b": (), "c": ()}
    assert choose_heads(scores, 1.0, 0.0)["c"] == (0, 1, 2)


def test_the_published_settings_are_the_defaults():
    razor = gw.RazorAttention()
    assert (razor.induction, razor.echo, razor.sinks, razor.window, razor.ratio) == (0.14, 0.01, 4, 4000, 5)
    assert (razor.tokens, razor.repeats) == (2500, 4)
    assert razor.window_for(16_000) == 4000
    assert razor.window_for(128_001) == 25_601


def test_heads_are_scored_kept_and_recorded(razored: gw.Program):
    record = razored.profile.measured["razor"]
    assert [len(layer) for layer in record["induction"]] == [2, 2]
    flat = [score for layer in record["induction"] for score in layer]
    best = flat.index(max(flat))
    assert record["kept"] == [[best] if best < 2 else [], [best - 2] if best >= 2 else []]
    assert {d.status for d in razored.decisions} == {"kept"}
    for phase in ("decode", "prefill", "extend"):
        assert [d.options["keep"] for d in razored.decisions if d.phase == phase] == record["kept"]
    assert {(d.options["sinks"], d.options["window"]) for d in razored.decisions} == {(2, 6)}


def test_the_page_has_a_map_of_retrieval_heads(razored: gw.Program):
    found = {each.title: each.data for each in retrieval_heads(razored)}
    kept = found["Heads that keep the whole cache"]["values"]
    for layer, heads in enumerate(razored.profile.measured["razor"]["kept"]):
        assert [head for head, state in enumerate(kept[layer]) if state == "whole"] == heads
    assert found["Retrieval heads: induction"]["values"] == razored.profile.measured["razor"]["induction"]
    assert retrieval_heads(gw.optimize(captured_llama(), progress=False)) == []


def logits(program: gw.Program) -> torch.Tensor:
    """Of a text that is much longer than the window, token by token."""
    return decoded_logits(program, tokens(24), block=1)


def test_a_profile_replays_in_a_new_process(razored: gw.Program, tmp_path):
    assert_replays(razored, logits(razored), "tests.profiles.test_razor", tmp_path)


def test_a_profile_of_another_number_of_layers_is_refused(razored: gw.Program):
    other = gw.capture_causal_lm(tiny_llama(num_hidden_layers=3), CACHE)
    with pytest.raises(StaleProfile):
        gw.optimize(other, profile=razored.profile, progress=False)
    with pytest.raises(InvalidArgument, match="heads are given of 1 layers, the program has 2"):
        optimized(heads=((0,),))


def test_heads_can_be_given():
    program = optimized(heads=((1,), (0, 1)))
    decode = [d for d in program.decisions if d.phase == "decode"]
    assert [d.status for d in decode] == ["kept", "refused"]
    assert decode[1].reason == "all heads of the layer are retrieval heads"
    assert program.state_bytes() == 4 * 16 * (2 * (CACHE + 9) + 4 * CACHE)
    assert "razor" not in program.profile.measured


def test_a_window_that_holds_the_whole_cache_is_refused_with_the_way_out():
    program = optimized(window=4000)
    assert all(
        d.status == "refused" and "take 4003 slots, the whole cache 32; for short contexts" in d.reason
        for d in program.decisions
    )
    assert optimized(ratio=1.05).decisions[0].options == {}


@pytest.mark.parametrize("order", [0, 1])
def test_what_is_kept_whole_can_be_quantized(order: int, tmp_path):
    methods = [gw.KVTuner(table=((8, 4), (4, 2))), gw.RazorAttention(window=6, ratio=8, heads=((0,), (1,)))]
    methods = methods[::-1] if order else methods
    both = gw.optimize(captured_llama(), methods=methods, calibration=[tokens(16)], progress=False)
    assert {d.method for d in both.decisions} == {"kvtuner+razor"}
    assert {d.status for d in both.decisions} == {"kept"}, both.decisions
    # Layer by layer: a packed head with its scales and minima, and one with a window, for keys and values.
    packed = CACHE * (16 + 4 + 8 + 4) + CACHE * (8 + 4 + 4 + 4)
    assert both.state_bytes() == packed + 4 * 16 * 4 * (1 + 4 + 6)
    text = str(both.report())
    assert "K8V4" in text
    assert f"{both.state_bytes() / (2 * 2 * 2 * CACHE * 16 * 4):.3f} of the whole cache" in text
    both.profile.save(tmp_path / "both.json")
    replayed = gw.optimize(captured_llama(), profile=tmp_path / "both.json", progress=False)
    assert torch.equal(replayed.generate(tokens(5), 20), both.generate(tokens(5), 20))


def test_int8_goes_with_it():
    both = gw.optimize(
        captured_llama(),
        methods=[gw.Int8(), gw.RazorAttention(window=6, ratio=8, heads=((0,), (1,)))],
        calibration=[tokens(16)],
        keep="smaller",
        progress=False,
    )
    assert {d.method for d in both.decisions if d.status == "kept"} == {"int8", "razor"}
    assert both.generate(tokens(6), 12).shape == (1, 18)


def test_a_budget_takes_layers_back():
    """Nothing is kept under a budget that nothing holds, and all of it under one that all holds."""
    razor = gw.RazorAttention(window=6, ratio=8, heads=((0,), (1,)))
    strict, loose = (
        gw.optimize(
            captured_llama(),
            methods=[razor],
            calibration=[tokens(30)],
            budget=gw.Budget(evaluate=lambda p: -_distance(p), max_drop=most),
            progress=False,
        )
        for most in (1e-9, 1e9)
    )
    assert {d.status for d in strict.decisions} == {"rolled_back"}
    assert {d.status for d in loose.decisions} == {"kept"}
    assert strict.state_bytes() > loose.state_bytes()


def _distance(program: gw.Program) -> float:
    """Of decoded logits from those of a prefill, which sees everything."""
    ids = tokens(30)
    program.reset()
    whole = program(ids, torch.arange(30))
    program.reset()
    steps = torch.cat([program(ids[:, i : i + 1], torch.tensor([i])) for i in range(30)], 1)
    return float((steps - whole).abs().max())


def test_the_report_shows_heads_and_bytes(razored: gw.Program):
    text = str(razored.report())
    assert "split cache: heads by layer" in text
    assert "first 2, last 6, mean" in text
    before = 2 * 2 * 2 * CACHE * 16 * 4
    assert f"1 of 4 heads keep every token: {razored.state_bytes() / 1e6:.2f} MB" in text
    assert f"{razored.state_bytes() / before:.3f} of the whole cache" in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ratio": 1}, "ratio: Input should be greater than 1"),
        ({"induction": 1.5}, "induction: Input should be less than or equal to 1"),
        ({"window": 0}, "window: Input should be greater than or equal to 1"),
        ({"heads": ((-1,),)}, "layer 0 is to keep head -1"),
    ],
)
def test_wrong_options(options, reason):
    with pytest.raises(InvalidArgument, match=reason):
        gw.RazorAttention(**options)


def test_a_program_without_a_cache_is_refused():
    with pytest.raises(InvalidArgument, match="the program has no key-value cache"):
        gw.optimize(Mlp().eval(), (torch.randn(2, 32),), methods=[gw.RazorAttention()], progress=False)
