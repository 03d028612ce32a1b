"""Packed caches in a program: the graph, the numbers, the bytes, files, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.build import build
from graphwright.passes.decision import Decision
from graphwright.passes.quantize_cache import QuantizeCache
from graphwright.prepare import Prepared, prepare
from graphwright.profiles.decode_loss import block_of, decoded_logits
from graphwright.profiles.profile import Profile, fingerprint
from tests.graph_text import check_text
from tests.models import CACHE, captured_llama, tiny_llama, tokens


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(captured_llama())


def program(prepared: Prepared, keep: Any = lambda site: True, **options: Any) -> gw.Program:
    decisions = [
        Decision(site=site.id, method="test", pass_name="quantize_cache", options=options)
        for sites in prepared.sites.values()
        for site in sites.cache
        if keep(site)
    ]
    profile = Profile(fingerprint=fingerprint(prepared.exported), data="", decisions=decisions)
    return build(prepared, profile)


@pytest.fixture(scope="module")
def full(prepared: Prepared) -> gw.Program:
    return program(prepared, lambda site: False)


def token_by_token(program: gw.Program, ids: Tensor) -> Tensor:
    program.reset()
    steps = [program(ids[:, i : i + 1], torch.tensor([i])) for i in range(ids.shape[1])]
    return torch.cat(steps, 1)


def test_the_graph_appends_to_stores_and_attends_to_them(prepared: Prepared):
    quantized = program(prepared, key_bits=4, value_bits=2)
    assert {d.status for d in quantized.decisions} == {"kept"}
    for phase in ("decode", "extend"):
        check_text(
            quantized.phases[phase].exported,
            """
            CHECK: %[[K:[a-z_0-9]+]]: {{.*}}cache_append.default(key_cache_0.per_token4, {{.*}}, 4, per_token)
            CHECK: %[[V:[a-z_0-9]+]]: {{.*}}cache_append.default(value_cache_0.per_token2, {{.*}}, 2, per_token)
            CHECK: graphwright.quantized_cache_attention.default({{%[a-z_0-9]+}}, %[[K]], %[[V]], %cache_position, 4, 2
            CHECK-NOT: scaled_dot_product_attention
            """,
        )
    prefill = [str(node.target) for node in quantized.phases["prefill"].exported.graph.nodes]
    assert sum("cache_append" in name for name in prefill) == 4
    assert sum("scaled_dot_product" in name for name in prefill) == 2, "a prefill attends to full precision"


@pytest.fixture(scope="module")
def wide() -> Prepared:
    """Heads of 32 channels, which KIVI's forms need, and a cache of more than one block of 32 tokens."""
    return prepare(gw.capture_causal_lm(tiny_llama(head_dim=32), 80))


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 2)])
def test_numbers(wide: Prepared, mode: str, bits: tuple[int, int]):
    quantized = program(wide, key_bits=bits[0], value_bits=bits[1], mode=mode)
    full = program(wide, lambda site: False)
    ids = tokens(70)
    assert torch.equal(quantized(ids, torch.arange(70)), full(ids, torch.arange(70))), "a prefill is exact"
    stepped, exact = token_by_token(quantized, ids), token_by_token(full, ids)
    error = float((stepped - exact).norm() / exact.norm())
    assert 0 < error < (0.02 if bits == (8, 8) else 0.5)
    torch.testing.assert_close(decoded_logits(quantized, ids, block_of(mode)), stepped, rtol=1e-3, atol=1e-3)
    quantized.reset()
    after = quantized(ids[:, :66], torch.arange(66))[:, -1:]
    assert torch.equal(after, full(ids[:, :66], torch.arange(66))[:, -1:])
    on = [quantized(ids[:, i : i + 1], torch.tensor([i])) for i in range(66, 70)]
    assert float((torch.cat(on, 1) - exact[:, 66:]).norm() / exact[:, 66:].norm()) < (0.02 if bits == (8, 8) else 0.5)


def test_heads_that_are_no_groups_are_refused(prepared: Prepared, full: gw.Program):
    quantized = program(prepared, mode="kivi")
    assert all("got head_dim 16, expected a multiple of 32" in d.reason for d in quantized.decisions)
    assert {d.status for d in quantized.decisions} == {"failed"}
    assert quantized.state_bytes() == full.state_bytes()


def test_decoding_goes_on_from_a_prefill(prepared: Prepared, full: gw.Program):
    quantized = program(prepared)
    ids = tokens(20)
    for each in (quantized, full):
        each.reset()
        each(ids[:, :12], torch.arange(12))
        each(ids[:, 12:19], torch.arange(12, 19))
    found, wanted = (each(ids[:, 19:], torch.tensor([19])) for each in (quantized, full))
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_bytes_are_those_of_the_stores(prepared: Prepared, full: gw.Program):
    # 2 layers, 2 heads of 16 channels, 32 tokens: float32 64 bytes a token, packed 16 bits / 8 and 4 of metadata.
    assert full.state_bytes() == 2 * 2 * 2 * CACHE * 64
    for key_bits, value_bits in ((8, 8), (8, 4), (2, 2)):
        quantized = program(prepared, key_bits=key_bits, value_bits=value_bits)
        assert quantized.state_bytes() == 2 * 2 * CACHE * (2 * key_bits + 4 + 2 * value_bits + 4)


def test_programs_do_not_share_their_state(prepared: Prepared):
    one, other = program(prepared), program(prepared)
    one(tokens(8), torch.arange(8))
    assert any(tensor.any() for tensor in one._state().values())
    assert not any(tensor.any() for tensor in other._state().values())
    one.reset()
    assert not any(tensor.any() for tensor in one._state().values())


def test_a_saved_program_is_the_same(prepared: Prepared, tmp_path):
    quantized = program(prepared, key_bits=4, value_bits=8)
    wanted = quantized.generate(tokens(6), 12)
    quantized.save(tmp_path / "q.gw")
    loaded = gw.load(tmp_path / "q.gw")
    assert torch.equal(loaded.generate(tokens(6), 12), wanted)
    assert loaded.state_bytes() == quantized.state_bytes()


def test_more_tokens_than_were_captured_are_refused(prepared: Prepared):
    quantized = program(prepared)
    with pytest.raises(gw.GraphwrightError, match="do not fit the captured cache of 32"):
        quantized.generate(tokens(30), 4)
    with pytest.raises(gw.GraphwrightError, match="do not fit the captured cache of 32"):
        quantized(tokens(1), torch.tensor([32]))


def test_a_place_is_quantized_in_all_phases_or_in_none(prepared: Prepared, full: gw.Program):
    quantized = program(prepared, lambda site: site.phase != "prefill" or not site.id.endswith("[0]"))
    by_status = {d.site: (d.status, d.reason) for d in quantized.decisions}
    failed = [reason for status, reason in by_status.values() if status == "failed"]
    assert failed
    assert all("prefill would keep the old state" in reason for reason in failed)
    ids = tokens(16)
    error = token_by_token(quantized, ids) - token_by_token(full, ids)
    assert float(error.norm()) < 0.02 * float(token_by_token(full, ids).norm())


def test_a_sliding_window_is_kept():
    model = sliding_mistral()
    prepared = prepare(gw.capture_causal_lm(model, CACHE))
    quantized, full = program(prepared), program(prepared, lambda site: False)
    assert {d.status for d in quantized.decisions} == {"kept"}
    windows = [
        node.args[9:]
        for node in quantized.phases["decode"].exported.graph.nodes
        if "quantized_cache_attention" in str(node.target)
    ]
    assert windows == [(8,), (8,)]
    ids = tokens(24)
    found, wanted = token_by_token(quantized, ids), token_by_token(full, ids)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def sliding_mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"key_bits": 3}, "got 3 bits, expected one of 8, 4, 2"),
        ({"value_bits": 16}, "got 16 bits"),
        ({"mode": "per_head"}, "unknown mode 'per_head'; there are per_token, kivi"),
    ],
)
def test_wrong_options_fail_with_a_reason(prepared: Prepared, options, reason):
    quantized = program(prepared, **options)
    assert all(d.status == "failed" and reason in d.reason for d in quantized.decisions)


def test_int8_and_a_packed_cache_go_together(prepared: Prepared):
    assert QuantizeCache.changes_state
    methods = [gw.Int8(), gw.KVTuner(table=((8, 8), (4, 4)))]
    both = gw.optimize(captured_llama(), methods=methods, calibration=[tokens(16)], keep="smaller", progress=False)
    kept = {d.method for d in both.decisions if d.status == "kept"}
    assert kept == {"int8", "kvtuner"}
    assert both.generate(tokens(6), 4).shape == (1, 10)
