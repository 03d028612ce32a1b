"""What quantizing one layer's keys or values does to the output, against running the whole program with it."""

import pytest
import torch

import graphwright as gw
from graphwright.passes.dialects import run_functional
from graphwright.profiles.cache_effects import enough, measure_effects
from tests.models import tiny_llama, tokens


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return gw.optimize(
        gw.capture_causal_lm(tiny_llama(head_dim=32, initializer_range=0.2), max_cache_len=64), progress=False
    )


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
def test_fewer_bits_cost_more_and_keys_more_than_nothing(program: gw.Program, mode: str) -> None:
    phase = program.phases["prefill"].exported
    sites = program.sites["prefill"].cache
    steps = []
    found = measure_effects(phase, sites, [[tokens(32), torch.arange(32)]], mode, lambda: steps.append(1))
    assert [each.place for each in found] == [site.place for site in sites]
    assert len(steps) == len(sites)
    for each in found:
        for other in (8, 4, 2):
            assert each.error((8, other)) <= each.error((4, other)) <= each.error((2, other))
            assert each.error((other, 8)) <= each.error((other, 4)) <= each.error((other, 2))
        assert each.error((2, 8)) > 0
        assert each.error((8, 2)) > 0


def test_the_graph_is_not_changed_and_the_reference_is_the_program(program: gw.Program) -> None:
    """Full precision is not measured as a variant, so the finest one bounds how far the clean run may be off."""
    phase = program.phases["prefill"].exported
    flat = [tokens(32), torch.arange(32)]
    before = run_functional(phase, flat)
    (first, *_) = measure_effects(phase, program.sites["prefill"].cache, [flat], "per_token")
    assert first.error((8, 8)) < 0.1 * first.error((2, 2))
    for one, two in zip(before, run_functional(phase, flat), strict=True):
        assert torch.equal(one, two)


def test_no_more_inputs_than_needed() -> None:
    flats = [[tokens(300), torch.arange(300)]] * 4
    assert len(enough(flats)) == 2
