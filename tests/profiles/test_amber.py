"""Amber Pruner on a tiny Llama: which sites it takes, prefill alone, replay, the report, and bad input."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import graphwright as gw
from graphwright.errors import GraphwrightError, InvalidArgument, StaleProfile
from graphwright.profiles.amber import AmberPruner
from tests.models import CACHE, VOCABULARY, Mlp, captured_llama, tiny_llama
from tests.new_process import assert_replays

TEXTS = torch.randint(0, VOCABULARY, (6, CACHE - 1), generator=torch.Generator().manual_seed(5))


def program(**options) -> gw.Program:
    return _program(AmberPruner(**options).model_dump_json())


@cache
def _program(options: str) -> gw.Program:
    method = AmberPruner(**json.loads(options))
    return gw.optimize(captured_llama(), methods=[method], calibration=[TEXTS], keep="smaller", progress=False)


def kept(of: gw.Program) -> list[gw.Decision]:
    return [d for d in of.decisions if d.status == "kept"]


def logits(of: gw.Program, count: int = TEXTS.shape[1]) -> torch.Tensor:
    of.reset()
    return of(TEXTS[:1, :count], torch.arange(count))


def test_down_query_and_gate_are_sparse_in_prefill_alone():
    made = program(coverage=1.0)
    assert {d.phase for d in kept(made)} == {"prefill"}
    assert sorted(d.facts["role"] for d in kept(made)) == ["down"] * 2 + ["gate"] * 2 + ["q"] * 2
    for phase, calls in {"prefill": 6, "decode": 0, "extend": 0}.items():
        graph = made.phases[phase].exported.graph
        assert sum("nm_sparsify" in str(node.target) for node in graph.nodes) == calls
    dense = {d.reason for d in made.decisions if d.phase == "decode" and d.facts["role"] == "down"}
    assert dense == {"dense outside the prefill, on the same weights"}


def test_the_most_sensitive_layer_is_skipped_as_far_as_coverage_allows():
    every = program(coverage=1.0).profile.measured["amber"]
    share = every["coverage"] - 0.01
    assert not program(coverage=share).profile.measured["amber"]["skipped_layers"]
    made = program(coverage=every["coverage"] / 1.7)
    (skipped,) = made.profile.measured["amber"]["skipped_layers"]
    errors = every["sensitivity"]
    assert not any("down" in place for place in errors)  # they are sparse whatever it is
    by_layer = [
        sum(e for place, e in errors.items() if f"layers.{layer}." in place and "down" not in place) for layer in (0, 1)
    ]
    assert by_layer[skipped] == max(by_layer)
    reasons = {d.reason for d in made.decisions if d.phase == "prefill" and d.facts["role"] in ("q", "gate")}
    assert reasons == {"", f"layer {skipped} is among the 1 most sensitive"}


def test_sensitivity_is_the_error_at_the_site():
    made = program(coverage=1.0, sensitivity="site")
    errors = made.profile.measured["amber"]["sensitivity"]
    first = next(d for d in kept(made) if d.facts["role"] == "q")
    # Measured by other code on the first text alone; sensitivity is over all six.
    assert first.local_error == pytest.approx(errors[first.place], rel=0.1)


def test_patterns_order_the_error_and_n_of_n_is_exact():
    exact = logits(gw.optimize(captured_llama(), progress=False))

    def error(*pattern: int) -> float:
        return float((logits(program(pattern=pattern, coverage=1.0)) - exact).norm() / exact.norm())

    assert error(2, 4) > error(4, 8) > error(8, 16) > error(12, 16) > error(16, 16) == 0


def test_decode_continues_a_sparse_prefill_densely():
    made, plain = program(coverage=1.0), gw.optimize(captured_llama(), progress=False)
    logits(made, 5)
    logits(plain, 5)
    for sparse, dense in zip(
        made.phases["decode"].exported.state_dict.values(),
        plain.phases["decode"].exported.state_dict.values(),
        strict=True,
    ):
        assert sparse.shape == dense.shape
    assert logits(made, 1).equal(logits(plain, 1))  # one token is a decode step


def test_all_roles_and_scorings():
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    made = program(always=roles, selectively=(), scoring="none")
    assert made.profile.measured["amber"]["coverage"] == 1
    assert len(kept(made)) == 14
    for scoring in ("robust_all", "norm"):
        assert kept(program(scoring=scoring))


def test_sensitivity_by_the_sites_own_output():
    made = program(sensitivity="site", coverage=0.3)
    assert len(made.profile.measured["amber"]["skipped_layers"]) == 1


def test_faster_refuses_what_is_slower():
    made = gw.optimize(captured_llama(), methods=[AmberPruner()], calibration=[TEXTS], progress=False)
    assert not kept(made)
    assert any("measured slower" in d.reason for d in made.decisions)


def test_the_report_tells_arithmetic_from_time():
    text = str(program(pattern=(4, 8), coverage=1.0).report())
    assert "sparse activations in prefill: 4:8 in 53.3% of linear arithmetic" in text
    assert "4:8, 8:16 and 16:32 have no NVIDIA hardware" in " ".join(text.split())


def test_a_plain_module_is_one_prefill():
    made = gw.optimize(
        Mlp().eval(), (torch.randn(8, 32),), methods=[AmberPruner(always=("up",))], keep="smaller", progress=False
    )
    assert [d.facts["role"] for d in kept(made)] == ["up"]


def test_a_profile_replays_bit_equal_in_a_new_process(tmp_path):
    made = program()
    assert_replays(made, logits(made), "tests.profiles.test_amber", tmp_path)


def test_a_profile_for_other_weights_is_refused():
    profile = program().profile
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(StaleProfile, match="weights"):
        gw.optimize(gw.capture_causal_lm(other, CACHE), profile=profile, progress=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pattern": (5, 4)}, "got n=5 of m=4, expected 1 to 4"),
        ({"pattern": (0, 4)}, "got n=0 of m=4"),
        ({"pattern": (2, 6)}, "got m=6"),
        ({"coverage": 1.5}, "coverage"),
        ({"scoring": "l1"}, "scoring"),
        ({"always": ("dwon",)}, "unknown role 'dwon'"),
        ({"patern": (2, 4)}, "patern"),
    ],
)
def test_wrong_options_are_refused_by_name(options, reason):
    with pytest.raises(GraphwrightError, match=reason):
        AmberPruner(**options)


def test_a_pattern_that_does_not_divide_the_width_is_a_refusal_at_the_site():
    made = gw.optimize(
        torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval(),
        (torch.randn(8, 40),),
        methods=[AmberPruner(always=("up", "down", "other", "head"))],
        keep="smaller",
        progress=False,
    )
    assert {d.facts["features"]: d.reason for d in made.decisions} == {
        "40 -> 64": "blocks of 16 do not divide 40 channels",
        "64 -> 8": "",
    }


@pytest.mark.parametrize("count", [0, 1])
def test_calibration_of_no_or_one_token_is_refused(count):
    with pytest.raises(InvalidArgument, match=r"at least two integer tokens"):
        gw.optimize(
            captured_llama(), methods=[AmberPruner()], calibration=[TEXTS[:1, :count]], keep="smaller", progress=False
        )
