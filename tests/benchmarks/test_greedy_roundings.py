"""Roundings of a cache are those of the packed cache, and a text that is given is read as it was written."""

from __future__ import annotations

import pytest
import torch

from graphwright.benchmarks.greedy_roundings import _forced, _greedy, _schemes, greedy_roundings
from graphwright.kernels.packed_cache import round_trip
from tests.models import VOCABULARY, tiny_llama

HEAD, TOKENS = 32, 40
SCHEMES = _schemes(HEAD)
KIVI = next(name for name in SCHEMES if "kivi" in name)


@pytest.fixture(scope="module")
def model():
    """Of heads that are as wide as the widest group."""
    return tiny_llama(hidden_size=4 * HEAD, max_position_embeddings=128)


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(0))


def test_a_token_is_rounded_as_the_packed_cache_does_it():
    x = torch.randn(2, 3, 7, HEAD)
    scheme = SCHEMES["8 bits, as per_token has them"]
    assert scheme.keys(x).equal(round_trip(x, 8, "per_token"))
    assert scheme.channel_bytes == (HEAD + 4) / HEAD


@pytest.mark.parametrize("name", ["bfloat16", "8 bits, keys rotated", KIVI])
@torch.no_grad()
def test_a_text_is_read_as_it_was_written(name, model, prompts):
    text = _greedy(model, prompts, TOKENS, SCHEMES[name])
    logits = _forced(model, prompts, text, SCHEMES[name])
    # Steps are summed in another order than calls of many tokens, so tokens that are nearly equal may change places.
    best = logits.topk(2).values
    clear = best[..., 0] - best[..., 1] > 1e-4
    assert clear.float().mean() > 0.9
    assert (logits.argmax(-1) == text)[clear].all()


@torch.no_grad()
def test_finer_roundings_move_the_best_logits_less(model, prompts):
    rows = {row.name: row for row in greedy_roundings(model, prompts, TOKENS)}
    errors = [rows[name].error for name in ("8 bits, as per_token has them", "9 bits", "10 bits", "12 bits")]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] / 8  # a sixteenth of the step
    for row in rows.values():
        assert row.until <= row.tokens <= 1
        assert row.texts <= len(prompts)
