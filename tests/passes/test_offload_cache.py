"""Offloaded caches: the graph, the numbers against the oracle and the full cache, padding, bytes, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.build import build
from graphwright.lowering.eager import lower_eager
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import run_functional
from graphwright.passes.edit import Edit
from graphwright.passes.offload_cache import OffloadCache
from graphwright.patterns.cache import find_caches
from graphwright.prepare import Prepared, prepare
from graphwright.profiles.profile import Profile, fingerprint
from tests.graph_text import check_text
from tests.models import captured_bloom, tokens
from tests.offloaded import SMALL, canonical, captured, decoded, freekv
from tests.passes.test_quantize_cache import sliding_mistral

PASS = {name: value for name, value in SMALL.items() if name != "dense_layers"}
# float32: the network sums over up to 96 terms of order one, twice a layer; sums over tokens are associated otherwise.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def offloaded() -> gw.Program:
    made = freekv()
    assert {d.status for d in made.decisions} == {"kept"}, made.decisions
    return made


def test_each_phase_appends_and_recalls(offloaded: gw.Program):
    check_text(
        offloaded.phases["decode"].exported,
        """
        CHECK: {{.*}}page_append.default(key_cache_0.fast
        CHECK: {{.*}}page_recall.default
        CHECK: {{.*}}paged_attention.default
        CHECK: {{.*}}page_recall.default
        CHECK: {{.*}}page_append.default(key_cache_1.fast
        CHECK-NOT: scaled_dot_product_attention
        """,
    )
    names = {
        phase: [str(node.target) for node in offloaded.phases[phase].exported.graph.nodes]
        for phase in ("prefill", "extend")
    }
    count = {phase: {"append": 2, "recall": 2, "gather": 2 * (phase == "extend")} for phase in names}
    for phase, calls in names.items():
        assert sum("scaled_dot_product" in call for call in calls) == 2, "many tokens look at everything"
        for what, wanted in count[phase].items():
            assert sum(f"page_{what}" in call for call in calls) == wanted, (phase, what)


@pytest.mark.parametrize("tau", [None, 0.0, 0.3, 2.0])
def test_decoding_equals_the_oracle_token_for_token(tau: float | None):
    system, oracle = freekv(tau=tau), freekv(tau=tau, offload=False)
    torch.testing.assert_close(decoded(system), decoded(oracle), **CLOSE)
    share = system.offload_figures()["correction_rate"]
    assert share == {None: 0.0, 2.0: 1.0}.get(tau, share)
    prompt = tokens(70, seed=1)
    assert torch.equal(system.generate(prompt, 40), oracle.generate(prompt, 40))
    assert system.offload_figures()["moved"] > 0
    # And what is computed is not the full cache's attention.
    assert not torch.allclose(decoded(oracle), decoded(canonical()), rtol=1e-3, atol=1e-3)


def test_taus_differ():
    assert float((decoded(freekv(tau=None)) - decoded(freekv(tau=2.0))).abs().max()) > 0.1
    rates = []
    for tau in (0.0, 0.3):
        decoded(freekv(tau=tau))
        rates.append(freekv(tau=tau).offload_figures()["correction_rate"])
    assert 0 < rates[0] < rates[1] < 1


@pytest.mark.parametrize("offload", [True, False])
def test_a_budget_of_the_whole_cache_is_dense(offload: bool):
    torch.testing.assert_close(decoded(freekv(budget=4096, offload=offload)), decoded(canonical()), **CLOSE)


def test_several_tokens_at_once_look_at_everything(offloaded: gw.Program):
    ids = tokens(120)
    for program in (offloaded, canonical()):
        program.reset()
        program(ids[:, :90], torch.arange(90))
    pieces = [(90, 93), (93, 111), (111, 120)]
    for low, high in pieces:
        found, wanted = (p(ids[:, low:high], torch.arange(low, high)) for p in (offloaded, canonical()))
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("tau", [None, 0.3])
def test_texts_of_different_lengths_are_what_they_are_alone(tau: float | None):
    system, oracle = freekv(2, tau=tau), freekv(2, tau=tau, offload=False)
    prompts = [tokens(90)[0], tokens(41, seed=3)[0]]
    both = system.generate(prompts, 24)
    assert torch.equal(both, oracle.generate(prompts, 24))


def test_a_budget_of_the_whole_cache_is_dense_with_padding():
    prompts = [tokens(90)[0], tokens(41, seed=3)[0]]
    assert torch.equal(freekv(2, budget=4096).generate(prompts, 24), canonical(2).generate(prompts, 24))


def test_the_functional_graph_computes_what_runs_in_place(offloaded: gw.Program):
    """On an empty cache, which is all that a functional run sees."""
    ids = tokens(50)
    for phase, flat in {"prefill": [ids, torch.arange(50)], "decode": [ids[:, :1], torch.tensor([0])]}.items():
        offloaded.reset()
        functional = run_functional(offloaded.phases[phase].exported, flat)[-1]
        offloaded.reset()
        torch.testing.assert_close(offloaded.run_phase(phase, flat), functional, **CLOSE)


def test_what_stays_in_memory_does_not_grow_with_the_context(offloaded: gw.Program):
    fast = 12 * 2 * 4 * 2 * 16 * 4
    summary, tables, rest = 2 * 32 * 2 * 16 * 4, 2 * (12 + 32) * 4, 10 * 8 + 4 * 16 * 4
    assert offloaded.state_bytes() == 2 * (fast + summary + tables + rest)
    decoded(offloaded)
    assert offloaded.state_bytes() == 2 * (fast + summary + tables + rest)


def program(prepared: Prepared, phases: Any = None, **options: Any) -> gw.Program:
    decisions = [
        Decision(site=site.id, method="test", pass_name="offload_cache", options=PASS | options)
        for phase, sites in prepared.sites.items()
        for site in sites.cache
        if phases is None or phase in phases
    ]
    return build(prepared, Profile(fingerprint=fingerprint(prepared.exported), data="", decisions=decisions))


def test_a_cache_is_offloaded_in_all_phases_or_in_none():
    made = program(prepare(captured()), phases=("decode", "prefill"))
    assert {d.status for d in made.decisions} == {"failed"}
    assert "extend would keep the old state" in made.decisions[0].reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"budget": 12}, "3 pages at hand leave none to choose beside 1 sinks and 2 recent"),
        ({"page": 0}, "got pages of 0 tokens, expected at least 1"),
        ({"window": 0}, "got page=4, sinks=1, window=0, expected at least 1, 0 and 1"),
        ({"pooling": "median"}, "unknown pooling 'median'; there are mean_softmax"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], reason: str):
    assert {d.reason.partition(reason)[1] for d in program(prepare(captured()), **options).decisions} == {reason}


def guard(captured: gw.Captured, phase: str = "decode", **changes: Any) -> str | None:
    exported = copy_exported(prepare(captured).exported[phase])
    edit = Edit(exported)
    site = find_caches(edit.view, phase).sites[0]
    return OffloadCache(**PASS).guard(replace(site, **changes), edit)


def test_caches_that_pages_cannot_stand_for_are_refused():
    assert guard(captured()) is None
    assert "cache grows" in str(guard(captured(), length=None))
    assert "not given as a tensor" in str(guard(captured(), positions=3))
    assert "keys have 16 features and values 8" in str(guard(captured(), value_head_dim=8))
    assert "reads the cache's heads repeated" in str(guard(captured(), key_write=None))
    assert "no more than its last 8 tokens" in str(guard(gw.capture_causal_lm(sliding_mistral(), 32)))
    assert "with a slope over the keys" in str(guard(captured_bloom()))


def test_all_state_is_written_in_place(offloaded: gw.Program):
    offloaded.reset()
    for phase in offloaded.phases.values():
        module = lower_eager(phase.exported)
        assert isinstance(module, torch.fx.GraphModule)
        called = [str(node.target).split(".")[1] for node in module.graph.nodes if "graphwright" in str(node.target)]
        assert called
        assert {name for name in called if name.startswith(("page_append", "page_recall"))} == {
            "page_append_",
            "page_recall_",
        }
        assert not [node for node in module.graph.nodes if "copy_" in str(node.target)]
