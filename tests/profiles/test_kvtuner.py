"""KVTuner: sensitivity, the search on a real program, tables, replay, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.errors import StaleProfile
from graphwright.prepare import prepare
from graphwright.profiles.cache_sensitivity import PAIRS, measure_sensitivity, output_errors_of_pairs
from graphwright.profiles.decode_loss import Divergence, decode_loss, decoded_logits
from tests.models import CACHE, Mlp, captured_llama, tiny_llama, tokens
from tests.new_process import assert_replays


def optimized(**options: Any) -> gw.Program:
    calibration = options.pop("calibration", [tokens(16), tokens(16, 1)])
    return gw.optimize(captured_llama(), methods=[gw.KVTuner(**options)], calibration=calibration, progress=False)


@pytest.fixture(scope="module")
def searched() -> gw.Program:
    return optimized(trials=12, bits=4.0)


def qkv(outlier: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    query, key, value = torch.randn(1, 4, 32, 32), torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64, 32)
    key[..., 3] += outlier
    query[..., 3] *= 0.1
    return query, key, value


def errors(outlier: float, mode: str) -> dict[tuple[int, int], float]:
    hidden = torch.zeros(32, 64, dtype=torch.bool)
    return output_errors_of_pairs(*qkv(outlier), hidden, 1.0, mode)[0]


def test_errors_fall_with_the_bits_of_either():
    found = errors(0.0, "per_token")
    assert set(found) == set(PAIRS)
    for low, high in ((2, 4), (4, 8)):
        for other in (2, 4, 8):
            assert found[low, other] > found[high, other]
            assert found[other, low] > found[other, high]
    assert found[8, 8] < 0.05


def test_keys_matter_more_by_token_and_less_by_channel():
    """What the paper finds: outlier channels of keys spoil a token's scale, and a scale by channel repairs that."""
    by_token, by_channel = errors(8.0, "per_token"), errors(8.0, "kivi")
    for high, low in ((8, 4), (8, 2), (4, 2)):
        assert by_token[high, low] < by_token[low, high]
    assert by_channel[4, 8] < 0.5 * by_token[4, 8]


def test_sensitivity_is_measured_layer_by_layer():
    prepared = prepare(captured_llama())
    sites = prepared.sites["prefill"].cache
    inputs = [[ids, torch.arange(16)] for ids in (tokens(16), tokens(16, 1))]
    layers = measure_sensitivity(prepared.exported["prefill"], sites, inputs, "per_token")
    assert [layer.place for layer in layers] == [site.place for site in sites]
    for layer in layers:
        assert all(len(found) == 2 for found in layer.output.values())
        assert layer.error((8, 8)) < layer.error((4, 4)) < layer.error((2, 2))
    # The same from the phase that reads the cache.
    extended = measure_sensitivity(prepared.exported["extend"], prepared.sites["extend"].cache, inputs, "per_token")
    for one, other in zip(layers, extended, strict=True):
        assert one.error((4, 4)) == pytest.approx(other.error((4, 4)), rel=1e-3)


def test_the_search_keeps_the_limit_and_packs_every_layer(searched: gw.Program):
    assert {d.status for d in searched.decisions} == {"kept"}
    record = searched.profile.measured["kvtuner"]
    assert record["bits"] <= 4.0
    assert len(record["trials"]) == 12
    assert len(record["sensitivity"]) == 2
    bits = [d.options["key_bits"] + d.options["value_bits"] for d in searched.decisions if d.phase == "decode"]
    assert sum(bits) / 4 == record["bits"]
    front = record["front"]
    assert [p["bits"] for p in front] == sorted(p["bits"] for p in front)
    assert [p["value"] for p in front] == sorted((p["value"] for p in front), reverse=True)
    within = [t["value"] for t in record["trials"] if t["bits"] <= 4.0]
    assert record["value"] == min(within)


def test_the_objective_is_the_loss_of_the_packed_program(searched: gw.Program):
    texts = [tokens(16), tokens(16, 1)]
    assert decode_loss(searched, texts) == pytest.approx(searched.profile.measured["kvtuner"]["value"], rel=1e-5)
    exact = gw.optimize(captured_llama(), progress=False)
    divergence = Divergence(exact, texts)
    assert divergence(exact) == pytest.approx(0, abs=1e-6)
    assert divergence(searched) > 1e-6


def test_the_loss_is_that_of_decoding_token_by_token(searched: gw.Program):
    ids = tokens(16)
    searched.reset()
    steps = [searched(ids[:, i : i + 1], torch.tensor([i])) for i in range(16)]
    wanted = torch.nn.functional.cross_entropy(torch.cat(steps, 1)[0, :-1], ids[0, 1:])
    assert decode_loss(searched, [ids]) == pytest.approx(float(wanted), rel=1e-4)
    assert decoded_logits(searched, ids).shape == (1, 16, 97)


def test_a_profile_replays_without_a_search(searched: gw.Program, tmp_path):
    searched.profile.save(tmp_path / "kv.json")
    replayed = gw.optimize(captured_llama(), profile=tmp_path / "kv.json", progress=False)
    assert torch.equal(replayed.generate(tokens(5), 8), searched.generate(tokens(5), 8))
    assert replayed.state_bytes() == searched.state_bytes()
    assert replayed.profile.measured["kvtuner"] == searched.profile.measured["kvtuner"]


def logits(program: gw.Program) -> torch.Tensor:
    """Of a text that was read through the packed cache."""
    return decoded_logits(program, tokens(20))


def test_a_profile_replays_in_a_new_process(searched: gw.Program, tmp_path):
    assert_replays(searched, logits(searched), "tests.profiles.test_kvtuner", tmp_path)


def test_a_profile_of_another_number_of_layers_is_refused(searched: gw.Program):
    other = gw.capture_causal_lm(tiny_llama(num_hidden_layers=3), CACHE)
    with pytest.raises(StaleProfile):
        gw.optimize(other, profile=searched.profile, progress=False)


def test_the_report_shows_bits_bytes_and_the_front(searched: gw.Program):
    text = str(searched.report())
    record = searched.profile.measured["kvtuner"]
    assert "packed cache: bits of keys and values by layer" in text
    assert f"{record['bits']:.2f} mean bits" in text
    assert "it does not save time" in text
    assert "chosen" in text


def test_a_function_of_the_user_decides():
    seen = []

    def most_bytes(program: gw.Program) -> float:
        seen.append(program.state_bytes())
        return -program.state_bytes()

    program = optimized(objective=most_bytes, trials=12, bits=5.0)
    record = program.profile.measured["kvtuner"]
    assert len(set(seen)) > 3
    assert record["objective"] == "the user's"
    assert record["value"] == min(t["value"] for t in record["trials"] if t["bits"] <= 5.0)
    assert program.state_bytes() == -record["value"]


def test_a_table_is_taken_as_it_is():
    program = optimized(table=((16, 16), (4, 2)))
    decode = [d for d in program.decisions if d.phase == "decode"]
    assert [d.status for d in decode] == ["refused", "kept"]
    assert decode[0].reason == "the table leaves this layer in full precision"
    assert decode[1].options == {"key_bits": 4, "value_bits": 2, "mode": "per_token"}
    assert program.state_bytes() == 2 * CACHE * (2 * 64 + 8 + 4 + 4 + 4)
    assert "as it was" in str(program.report())


def test_a_budget_rolls_layers_back():
    budget = gw.Budget(max_error=0.02)
    method = gw.KVTuner(table=((8, 8), (2, 2)))
    program = gw.optimize(captured_llama(), methods=[method], calibration=[tokens(16)], budget=budget, progress=False)
    states = {d.place: {e.status for e in program.decisions if e.place == d.place} for d in program.decisions}
    assert sorted(map(tuple, states.values())) == [("kept",), ("rolled_back",)], "a layer is one thing in all phases"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"table": ((8, 8),)}, "the table is of 1 layers, the program has 2"),
        ({"table": ((8, 8), (5, 4))}, "layer 1 has 5 and 4 bits"),
        ({"table": ((8, 8), (16, 4))}, "layer 1 has 16 and 4 bits"),
        ({"bits": 1.5}, "bits: Input should be greater than or equal to 2"),
        ({"mode": "per_head"}, "mode"),
        ({"trials": 0}, "trials"),
        ({"mode": "kivi", "trials": 2}, "multiple of 32"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(gw.GraphwrightError, match=reason):
        optimized(**options)


def test_a_program_without_a_cache_is_refused():
    with pytest.raises(gw.GraphwrightError, match="the program has no key-value cache"):
        gw.optimize(Mlp().eval(), (torch.randn(2, 32),), methods=[gw.KVTuner()], progress=False)
