"""The one call, on a real decoder and on plain modules: what it finds, keeps, refuses, rolls back and replays."""

import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidType, StaleProfile
from tests.models import CACHE, Mlp, captured_llama, tiny_llama, tokens


@pytest.fixture(scope="module")
def canonical() -> gw.Program:
    return gw.optimize(captured_llama())


@pytest.fixture(scope="module")
def quantized() -> gw.Program:
    return gw.optimize(captured_llama(), methods=[gw.Int8()], calibration=[tokens(24)], keep="smaller")


def test_canonical_program_computes_what_the_model_computes(canonical) -> None:
    model, ids = tiny_llama(), tokens(20)
    with torch.no_grad():
        expected = model(ids).logits
    canonical.reset()
    torch.testing.assert_close(canonical(ids, torch.arange(20)), expected, rtol=1e-4, atol=1e-5)


def test_phases_share_the_cache(canonical) -> None:
    model, ids = tiny_llama(), tokens(20)
    with torch.no_grad():
        expected = model(ids).logits
    canonical.reset()
    canonical(ids[:, :7], torch.arange(7))  # prefill
    middle = canonical(ids[:, 7:15], torch.arange(7, 15))  # extend
    last = canonical(ids[:, 15:16], torch.tensor([15]))  # decode
    torch.testing.assert_close(middle, expected[:, 7:15], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, expected[:, 15:16], rtol=1e-4, atol=1e-5)


def test_every_phase_has_its_sites_and_facts(canonical) -> None:
    expected = {"decode": "cache_causal", "prefill": "causal", "extend": "cache_causal"}
    assert list(canonical.phases) == list(expected)
    for phase, mask in expected.items():
        sites = canonical.sites[phase]
        assert len(sites.attention) == 2
        assert len(sites.linear) == 15
        assert len(sites.norm) == 5
        assert len(sites.cache) == 2
        assert {site.mask.kind for site in sites.attention} == {mask}
        assert {(site.heads, site.kv_heads) for site in sites.attention} == {(4, 2)}


def test_site_ids_are_the_same_in_all_phases(canonical) -> None:
    places = {phase: {site.place for site in sites.all} for phase, sites in canonical.sites.items()}
    assert places["decode"] == places["prefill"] == places["extend"]


def test_weights_are_stored_once_whatever_the_number_of_phases(canonical) -> None:
    model = tiny_llama()
    distinct = {p.data_ptr(): p.numel() * 4 for p in model.parameters()}
    buffers = 4 * 8  # the rotary frequencies
    assert canonical.weight_bytes() == sum(distinct.values()) + buffers


def test_generate_is_the_model_s_own_greedy_text(canonical) -> None:
    model, ids = tiny_llama(), tokens(6)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(canonical.generate(ids, 12), expected)


def test_sampling_is_repeatable_by_seed(canonical) -> None:
    first, second, other = (canonical.generate(tokens(6), 20, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_int8_keeps_every_linear_but_the_head(quantized) -> None:
    for phase in quantized.phases:
        kept = [d for d in quantized.decisions if d.phase == phase and d.status == "kept"]
        assert len(kept) == 14
        (refused,) = [d for d in quantized.decisions if d.phase == phase and d.status == "refused"]
        assert refused.facts["role"] == "head"
        targets = [str(n.target) for n in quantized.phases[phase].exported.graph.nodes]
        assert targets.count("graphwright.int8_linear.default") == 8  # two layers of qkv, o, gate and up, down
        assert targets.count("aten.linear.default") == 1


def test_int8_is_close_and_measured(canonical, quantized) -> None:
    ids = tokens(20)
    canonical.reset()
    quantized.reset()
    exact, rounded = (p(ids, torch.arange(20)) for p in (canonical, quantized))
    error = float((exact - rounded).norm() / exact.norm())
    assert 0 < error < 0.1
    for decision in quantized.decisions:
        if decision.status == "kept":
            assert 0 < decision.local_error < 0.1
            assert decision.measured_gain > 0


def test_quantized_weights_are_shared_by_the_phases(quantized) -> None:
    name = next(n for n in quantized.phases["decode"].exported.state_dict if ".int8" in n)
    tensors = [phase.exported.state_dict[name] for phase in quantized.phases.values()]
    assert all(tensor is tensors[0] for tensor in tensors)


def test_the_captured_program_is_not_changed(quantized) -> None:
    targets = {str(node.target) for node in captured_llama().exported.graph.nodes}
    assert "graphwright.int8_linear.default" not in targets


def test_a_budget_rolls_back_until_it_holds() -> None:
    budget = gw.Budget(max_error=0.003, probes=4)
    options = {"methods": [gw.Int8()], "calibration": [tokens(24)], "keep": "smaller"}
    program = gw.optimize(captured_llama(), budget=budget, **options)
    rolled_back = [d for d in program.decisions if d.status == "rolled_back"]
    kept = [d for d in program.decisions if d.status == "kept"]
    assert rolled_back, "all of int8 costs this model more than 0.3 %"
    assert kept, "some of it fits"
    canonical = gw.optimize(captured_llama())
    exact, rounded = (p(tokens(24), torch.arange(24)) for p in (canonical, program))
    assert float((exact - rounded).norm() / exact.norm()) <= 0.003
    frontier = program.profile.measured["frontier"]
    assert [point["rolled_back"] for point in frontier] == sorted(point["rolled_back"] for point in frontier)
    assert sum(d.output_error is not None for d in program.decisions) == 4


def test_a_budget_of_the_user_s_own_metric() -> None:
    seen = []

    def quality(program: gw.Program) -> float:
        seen.append(program)
        return -float(len([d for d in program.decisions if d.status == "kept" and d.phase == "prefill"]))

    budget = gw.Budget(evaluate=quality, max_drop=5, probes=0)
    program = gw.optimize(captured_llama(), methods=["int8"], budget=budget, keep="smaller")
    assert len([d for d in program.decisions if d.status == "kept" and d.phase == "prefill"]) == 5
    assert len(seen) >= 3


def test_a_profile_replays_without_search(quantized, tmp_path) -> None:
    quantized.profile.save(tmp_path / "profile.json")
    replayed = gw.optimize(captured_llama(), profile=tmp_path / "profile.json")
    ids = tokens(20)
    quantized.reset()
    replayed.reset()
    assert torch.equal(quantized(ids, torch.arange(20)), replayed(ids, torch.arange(20)))
    assert [d.status for d in replayed.decisions] == [d.status for d in quantized.decisions]


def test_a_profile_of_another_graph_or_of_other_weights_is_refused(quantized) -> None:
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    with pytest.raises(StaleProfile, match="weights is"):
        gw.optimize(gw.capture_causal_lm(other, CACHE), profile=quantized.profile)
    with pytest.raises(StaleProfile, match="graph is"):
        gw.optimize(gw.capture_causal_lm(tiny_llama(), CACHE + 8), profile=quantized.profile)


def test_plain_modules_with_dynamic_batches() -> None:
    x = torch.randn(5, 32)
    program = gw.optimize(
        Mlp().eval(),
        (x,),
        dynamic_shapes=({0: torch.export.Dim("b", min=2, max=64)},),
        methods=["int8"],
        keep="smaller",
    )
    assert [(d.facts["role"], d.status) for d in program.decisions] == [("up", "kept"), ("head", "refused")]
    longer = torch.randn(33, 32)
    torch.testing.assert_close(program(longer), Mlp()(longer), rtol=0.1, atol=0.02)
    torch.testing.assert_close(program.as_module()(longer), program(longer))


def test_a_rewrite_that_raises_leaves_its_site_and_goes_on(monkeypatch) -> None:
    from graphwright.passes.quantize_linear import QuantizeLinear

    rewrite = QuantizeLinear.rewrite

    def fails_on_down(self, site, edit):
        rewrite(self, site, edit)
        if site.role == "down":
            raise RuntimeError("made to fail")

    monkeypatch.setattr(QuantizeLinear, "rewrite", fails_on_down)
    program = gw.optimize(captured_llama(), methods=[gw.Int8()], keep="smaller")
    failed = [d for d in program.decisions if d.status == "failed"]
    assert {d.facts["role"] for d in failed} == {"down"}
    assert all("made to fail" in d.reason for d in failed)
    assert len([d for d in program.decisions if d.status == "kept"]) == 3 * 12
    assert program(tokens(8), torch.arange(8)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["int9"]}, InvalidArgument, "unknown method 'int9'; there are .*int8"),
        ({"methods": [3]}, InvalidType, "expected a method or its name, got 3"),
        ({"methods": "int8"}, InvalidType, "methods must be a list"),
        ({"methods": ["int8"], "profile": "x.json"}, InvalidArgument, "not both"),
        ({"profile": "no-such.json"}, OSError, "no-such.json"),
        ({"budget": gw.Budget(max_error=0.1)}, InvalidArgument, "a budget needs methods"),
        ({"budget": 0.1, "methods": ["int8"]}, InvalidType, "must be a graphwright.Budget"),
        ({"target": "tpu"}, InvalidArgument, "unknown target 'tpu'; there is eager"),
        ({"keep": "all"}, InvalidArgument, "keep must be"),
        ({"mesh": object()}, InvalidArgument, "mesh is not supported"),
        ({"methods": ["int8"], "calibration": []}, InvalidArgument, "calibration is empty"),
        (
            {"methods": ["int8"], "calibration": ["text"]},
            InvalidType,
            "calibration item 0: expected a tensor of tokens",
        ),
        ({"methods": ["int8"], "calibration": [torch.tensor([[5000, 1]])]}, InvalidArgument, "outside the vocabulary"),
        ({"methods": ["int8"], "calibration": [torch.tensor([[1]])]}, InvalidArgument, "at least two integer tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_are_one_clear_error(options, error, message) -> None:
    with pytest.raises(error, match=message) as raised:
        gw.optimize(captured_llama(), **options)
    assert isinstance(raised.value, gw.GraphwrightError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": ("q", "z")}, "unknown role 'z'"),
        ({"rank": 3}, "rank: Extra inputs are not permitted"),
    ],
)
def test_wrong_method_options_name_the_option(options, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        gw.Int8(**options)


@pytest.mark.parametrize(
    "options", [{}, {"max_error": 0.1, "evaluate": float, "max_drop": 1}, {"evaluate": float}, {"max_error": -1}]
)
def test_wrong_budgets_are_refused(options) -> None:
    with pytest.raises(InvalidArgument, match="Budget"):
        gw.Budget(**options)


def test_options_choose_roles_and_skip_modules() -> None:
    method = gw.Int8(roles=("q", "down"), skip=("layers.1.mlp.down_proj",))
    program = gw.optimize(captured_llama(), methods=[method], keep="smaller")
    kept = {d.place for d in program.decisions if d.status == "kept"}
    assert {place.rsplit("/", 1)[0].split("layers.")[1] for place in kept} == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "0.mlp.down_proj",
    }


def test_a_model_without_a_site_stays_as_it_is() -> None:
    program = gw.optimize(torch.nn.ReLU().eval(), (torch.randn(3),), methods=["int8"])
    assert program.decisions == []
    assert "linear" in str(program.report())
    assert torch.equal(program(torch.tensor([-1.0, 0.0, 2.0])), torch.tensor([0.0, 0.0, 2.0]))
