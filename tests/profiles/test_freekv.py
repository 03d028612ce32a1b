"""FreeKV: what is decided, replay, the report, together with other methods, under a budget, and exports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument, UnsupportedLowering
from graphwright.html_report.method_pictures import hits_and_stalls
from tests.models import Mlp, captured_llama, tokens
from tests.new_process import assert_replays
from tests.offloaded import canonical, captured, decoded, freekv

TINY: dict[str, Any] = {"budget": 16, "page": 4, "sinks": 4, "window": 4}


def logits(program: gw.Program) -> torch.Tensor:
    """Of a text that is longer than what is at hand, the second half token by token."""
    return decoded(program, 12, 30)


def test_the_published_settings_are_the_defaults():
    method = gw.FreeKV()
    assert (method.budget, method.page, method.tau) == (2048, 32, 0.8)
    assert (method.sinks, method.window, method.dense_layers, method.pooling) == (128, 128, 1, "mean_softmax")


def test_the_first_layers_keep_their_cache():
    made = gw.optimize(captured_llama(), methods=[gw.FreeKV(**TINY)], progress=False)
    for phase in ("decode", "prefill", "extend"):
        layers = [d for d in made.decisions if d.phase == phase]
        assert [d.status for d in layers] == ["refused", "kept"]
        assert layers[0].reason == "the first 1 layers keep their cache as it is"
    explained = made.explain(made.decisions[1].site)
    assert "offload_cache with budget=16" in explained
    assert "bytes at hand: 6144" in explained  # 16 tokens, and summaries like 8
    every = gw.optimize(captured_llama(), methods=[gw.FreeKV(dense_layers=2)], progress=False)
    assert {d.status for d in every.decisions} == {"refused"}


def test_a_profile_replays_in_a_new_process(tmp_path):
    made = gw.optimize(captured_llama(), methods=[gw.FreeKV(**TINY)], progress=False)
    assert_replays(made, logits(made), "tests.profiles.test_freekv", tmp_path)


def test_the_report_says_what_moved():
    program = freekv(tau=0.0)
    program.reset()
    assert "since the last reset" not in str(program.report())
    decoded(program)
    found, text = program.offload_figures(), str(program.report())
    assert "offloaded cache: 2 layers, at hand 48 tokens in pages of 4, first 4, last 8, tau 0.0" in text
    assert f"{found['correction_rate']:.1%}" in text
    assert f"{found['hit_rate']:.1%}" in text
    assert "on disk 0.07 MB" in text  # 2 layers of 128 tokens
    assert program.report().to_json()["offload"] == found
    assert found["steps"] == 25  # a prompt and 24 tokens
    assert found["hit"] <= found["chosen"]
    assert found["bytes"] == found["moved"] * 4 * 2 * 16 * 4
    assert freekv(offload=False).offload_figures() == canonical().offload_figures() == {}


def test_the_page_shows_hits_and_stalls_by_layer():
    program = freekv(tau=0.0)
    program.reset()
    assert hits_and_stalls(program) == hits_and_stalls(canonical()) == []
    decoded(program)
    hits, stalls = (picture.data["series"][0]["values"] for picture in hits_and_stalls(program))
    assert len(hits) == len(stalls) == 2
    found = program.offload_figures()
    assert sum(stalls) / 1e3 * found["steps"] == pytest.approx(found["stalled"])
    assert min(hits) <= found["hit_rate"] <= max(hits)


def test_wrong_options_are_named():
    with pytest.raises(InvalidArgument, match="FreeKV: pooling"):
        gw.FreeKV(pooling="median")
    with pytest.raises(InvalidArgument, match="FreeKV: budget"):
        gw.FreeKV(budget=0)
    with pytest.raises(InvalidArgument, match="FreeKV: the program has no key-value cache"):
        gw.optimize(Mlp().eval(), (torch.randn(2, 32),), methods=[gw.FreeKV()], progress=False)


def test_one_cache_is_rewritten_by_one_method():
    methods = [gw.KVTuner(table=((8, 8), (8, 8))), gw.FreeKV(**TINY)]
    with pytest.raises(InvalidArgument, match=r"kvtuner and freekv would both rewrite .*; choose one of them"):
        gw.optimize(captured_llama(), methods=methods, progress=False)


def test_int8_goes_with_it():
    methods = [gw.Int8(), gw.FreeKV(**TINY)]
    both = gw.optimize(captured_llama(), methods=methods, calibration=[tokens(16)], keep="smaller", progress=False)
    assert {d.method for d in both.decisions if d.status == "kept"} == {"int8", "freekv"}
    assert both.generate(tokens(6), 20).shape == (1, 26)


def test_a_budget_takes_layers_back():
    """Nothing is kept under a budget that nothing holds."""

    def distance(program: gw.Program) -> float:
        return -float((decoded(program) - decoded(canonical())).abs().max())

    made = gw.optimize(
        captured(),
        methods=[gw.FreeKV(**TINY)],
        calibration=[tokens(30)],
        budget=gw.Budget(evaluate=distance, max_drop=1e-6),
        progress=False,
    )
    assert {d.status for d in made.decisions} == {"refused", "rolled_back"}
    assert made.offload_figures() == {}


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_other_targets_refuse_it_by_name(suffix: str, tmp_path):
    with pytest.raises(UnsupportedLowering, match="graphwright::page_append: pages move between memory and a file"):
        freekv(tau=0.0).export(tmp_path / f"model.{suffix}")
    assert list(tmp_path.iterdir()) == []
