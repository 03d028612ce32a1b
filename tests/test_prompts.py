"""Batches of prompts of different lengths: each sequence gives what it gives alone; what does not fit is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidType
from graphwright.prompts import left_padded
from tests.graph_text import check_text
from tests.models import CACHE, tiny_llama, tokens

LENGTHS = (9, 3, 14)


@cache
def captured(padding: bool) -> gw.Captured:
    """Three padded sequences, or one; heads of 32 channels, which KIVI's forms need."""
    return gw.capture_causal_lm(tiny_llama(head_dim=32), CACHE, len(LENGTHS) if padding else 1, padding=padding)


def prompts() -> list[Tensor]:
    return [tokens(length, seed)[0] for seed, length in enumerate(LENGTHS)]


@cache
def optimized(padding: bool, pair: tuple[int, int] | None, mode: Any = "per_token") -> gw.Program:
    methods = [] if pair is None else [gw.KVTuner(table=(pair, pair), mode=mode)]
    program = gw.optimize(captured(padding), methods=methods, calibration=[tokens(8)], progress=False)
    assert {d.status for d in program.decisions} <= {"kept"}
    return program


@pytest.mark.parametrize("pair", [None, (8, 8), (4, 2)])
def test_each_sequence_gives_what_it_gives_alone(pair: tuple[int, int] | None):
    """In mode `per_token` a token's bytes are its own, so packing changes nothing about that."""
    together = optimized(True, pair).generate(prompts(), 12)
    single = optimized(False, pair)
    for prompt, row in zip(prompts(), together, strict=True):
        assert torch.equal(single.generate(prompt[None], 12)[0], row[-12 - len(prompt) :])


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_logits_are_those_of_the_model(mode: str):
    """Prefill, extension and decode, 8 bits: as the model without a cache, to what 8 bits cost (1/255 of a range)."""
    model, program = tiny_llama(head_dim=32), optimized(True, (8, 8), mode)
    rows = [tokens(length + 8, seed) for seed, length in enumerate(LENGTHS)]
    longest = max(LENGTHS) + 8
    starts = torch.tensor([longest - row.shape[1] for row in rows])
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    program.reset()
    edges = [(0, 12), (12, 18), *((i, i + 1) for i in range(18, longest))]
    found = torch.cat([program(ids[:, a:b], torch.arange(a, b), starts) for a, b in edges], 1)
    assert found.isfinite().all(), "padding must not reach anything as NaN"
    for row, start, logits in zip(rows, starts.tolist(), found, strict=True):
        wanted = model(row).logits[0].detach()
        torch.testing.assert_close(logits[start:][: 12 - start], wanted[: 12 - start], rtol=1e-4, atol=1e-5)
        assert float((logits[start:] - wanted).norm() / wanted.norm()) < 0.02


def test_learned_positions_start_with_the_sequence():
    """A shift of all positions is nothing to rotary embeddings, but GPT-2 looks positions up."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    program = gw.optimize(gw.capture_causal_lm(model, CACHE, 2, padding=True), progress=False)
    short = tokens(4)
    ids = torch.cat([tokens(9, 1), torch.nn.functional.pad(short, (5, 0))])
    found = program(ids, torch.arange(9), torch.tensor([0, 5]))[1, 5:]
    torch.testing.assert_close(found, model(short).logits[0], rtol=1e-4, atol=1e-5)


def test_the_operator_is_given_the_starts():
    quantized = optimized(True, (4, 4))
    for phase in ("decode", "extend"):
        check_text(
            quantized.phases[phase].exported,
            """
            CHECK: quantized_cache_attention.default({{.*}}, 32, {{[0-9.]+}}, 0, %starts)
            CHECK-NOT: scaled_dot_product_attention
            """,
        )
    facts = {phase: sites.attention[0].mask for phase, sites in optimized(True, None).sites.items()}
    assert {fact.kind for fact in facts.values()} == {"cache_causal"}
    assert all(fact.starts and fact.padding.name == "starts" for fact in facts.values())


def test_without_padding_nothing_changes():
    program = optimized(False, None)
    assert program.inputs == ("input_ids", "cache_position")
    assert program.sites["prefill"].attention[0].mask.kind == "causal", "SDPA's own flag"
    same = program.generate([tokens(6)[0].tolist()], 5)
    assert torch.equal(same, program.generate(tokens(6), 5))
    assert torch.equal(same, program.generate(tokens(6), 5, attention_mask=torch.ones(1, 6)))


def test_starts_may_be_left_out():
    program = optimized(True, None)
    ids = torch.cat([tokens(6, seed) for seed in range(3)])
    full = program(ids, torch.arange(6), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(program(ids, torch.arange(6)), full)


def test_tokens_with_a_mask_are_as_a_list():
    program = optimized(True, None)
    ids, starts = left_padded(prompts(), None, 3, 5)
    mask = (torch.arange(ids.shape[1]) >= starts[:, None]).long()
    found = program.generate(ids, 4, attention_mask=mask)
    assert torch.equal(found, program.generate(prompts(), 4, eos_token_id=5)[:, : found.shape[1]])
    assert found[1, : starts[1]].tolist() == [5] * int(starts[1])


def test_a_saved_program_takes_padding(tmp_path):
    program = optimized(True, (8, 4))
    program.save(tmp_path / "p.gw")
    assert torch.equal(gw.load(tmp_path / "p.gw").generate(prompts(), 5), program.generate(prompts(), 5))


ONES = torch.ones(3, 4, dtype=torch.int64)
RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
EMPTY = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("args", "options", "error", "reason"),
    [
        (ONES, {"attention_mask": RIGHT}, InvalidArgument, "row 1 .* pad on the left"),
        (ONES, {"attention_mask": EMPTY}, InvalidArgument, "row 1 .* is all padding"),
        (
            ONES,
            {"attention_mask": RIGHT[:2]},
            InvalidType,
            "attention_mask must be .3, 4",
        ),
        ([[1, 2], [3]], {"attention_mask": RIGHT}, InvalidArgument, "a list of prompts needs none"),
        (
            torch.ones(4, 4, dtype=torch.int64),
            {},
            InvalidType,
            r"tokens must be int64 \[3, prompt\], got int64 \[4, 4\]",
        ),
        (ONES.float(), {}, InvalidType, "got float32"),
        ([[1], [2], [3], [4]], {}, InvalidType, "a list of 3 prompts, got 4 prompts"),
        ([[1], [], [3]], {}, InvalidArgument, "prompt 1 is empty"),
        ([[1], [0.5], [3]], {}, InvalidType, "prompt 1 must be integers"),
        ([[1], ["a"], [3]], {}, InvalidType, "prompt 1 is no list of tokens"),
        ([[1], [2], [3] * 30], {}, InvalidArgument, "30 . 4 tokens do not fit the captured cache of 32"),
    ],
)
def test_what_does_not_fit_is_refused(args: Any, options: dict[str, Any], error: type[Exception], reason: str):
    with pytest.raises(error, match=reason):
        optimized(True, None).generate(args, 4, **options)


def test_padding_that_was_not_captured_is_refused():
    program = gw.optimize(gw.capture_causal_lm(tiny_llama(), CACHE, 2), progress=False)
    with pytest.raises(InvalidArgument, match=r"need a program of capture_causal_lm\(.*padding=True"):
        program.generate([[1, 2, 3], [4]], 2)
    assert program.generate([[1, 2, 3], [4, 5, 6]], 2).shape == (2, 5)


def test_a_start_outside_the_cache_is_refused():
    with pytest.raises(InvalidArgument, match="do not lie in the captured cache of 32"):
        optimized(True, None)(ONES, torch.arange(4), torch.tensor([0, -1, 0]))
