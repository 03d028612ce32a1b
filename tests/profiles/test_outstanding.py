"""Outstanding-sparse on a tiny Llama: exact scales, which sites, shared int8 weights, replay, and bad input."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import graphwright as gw
from graphwright.errors import GraphwrightError, InvalidArgument
from graphwright.profiles.outstanding import OutstandingSparse, scale_of
from tests.models import CACHE, VOCABULARY, captured_llama
from tests.new_process import assert_replays

TEXTS = torch.randint(0, VOCABULARY, (6, CACHE - 1), generator=torch.Generator().manual_seed(5))


def program(**options) -> gw.Program:
    return _program(OutstandingSparse(**{"sensitivity": "site", **options}).model_dump_json())


@cache
def _program(options: str) -> gw.Program:
    method = OutstandingSparse(**json.loads(options))
    return gw.optimize(captured_llama(), methods=[method], calibration=[TEXTS], keep="smaller", progress=False)


def kept(of: gw.Program, pass_name: str, phase: str = "prefill") -> list[gw.Decision]:
    return [d for d in of.decisions if d.status == "kept" and d.pass_name == pass_name and d.phase == phase]


def logits(of: gw.Program) -> torch.Tensor:
    of.reset()
    return of(TEXTS[:1], torch.arange(TEXTS.shape[1]))


def test_sparse_and_int8_in_prefill_int8_elsewhere():
    made = program(coverage=1.0, int8_error=0.05)
    assert len(kept(made, "sparsify_quantize_linear")) == 6
    assert len(kept(made, "quantize_linear")) == 8
    for phase in ("decode", "extend"):
        assert not kept(made, "sparsify_quantize_linear", phase)
        assert len(kept(made, "quantize_linear", phase)) == 14
    for phase in ("prefill", "decode", "extend"):
        assert len(kept(made, "widen_norm", phase)) == 4
        assert len(kept(made, "widen_up", phase)) == 2
    int8 = [
        {name: tensor.data_ptr() for name, tensor in made.phases[phase].exported.state_dict.items() if "int8" in name}
        for phase in ("prefill", "decode")
    ]
    assert int8[0] == int8[1]  # one set of weights
    assert len(int8[0]) == 28


def test_scales_alone_change_nothing():
    exact = logits(gw.optimize(captured_llama(), progress=False))
    made = program(pattern=(16, 16), int8_roles=(), coverage=1.0)
    assert kept(made, "widen_up")
    # 16 of 16 are all: what is left is the rounding of scaled weights, 2^-24 each, over 14 linears of up to 96 terms.
    assert (logits(made) - exact).abs().max() <= 14 * 96 * 2**-24 * exact.abs().max()


def test_int8_adds_little_to_sparsity():
    exact = logits(gw.optimize(captured_llama(), progress=False))

    def error(**options) -> float:
        return float((logits(program(coverage=1.0, **options)) - exact).norm() / exact.norm())

    sparse, both = error(int8_roles=()), error()
    assert error(pattern=(16, 16)) < sparse
    assert both < 1.2 * sparse


def test_sites_that_int8_hurts_stay_in_float():
    made = program(int8_error=0.01, coverage=1.0)
    for decision in made.decisions:
        error = decision.figures.get("int8 error")
        if error is None or decision.phase != "prefill":
            continue
        assert ("quantize" in decision.pass_name and decision.status == "kept") == (error <= 0.01)
    errors = made.profile.measured["outstanding"]["int8"]
    assert min(errors.values()) <= 0.01 < max(errors.values())
    assert kept(made, "sparsify_activations")


def test_factors_and_directions():
    original = program(factors_from="original")
    assert all("factors" in d.options for d in kept(original, "sparsify_quantize_linear"))
    assert not torch.equal(logits(original), logits(program()))
    assert not kept(program(direction="none"), "widen_norm")
    wide = program().profile.tensors
    smooth = program(direction="smooth").profile.tensors
    for name in smooth:
        torch.testing.assert_close(smooth[name] * wide[name], torch.ones_like(wide[name]))


def test_the_scale_follows_the_formula():
    activation, weight = torch.tensor([1.0, 100.0, 0.0, 3.0]), torch.tensor([0.5, 0.25, 1.0, 0.0])
    scale = scale_of(activation, weight, 0.1)
    raw = activation[:2] ** 0.1 / weight[:2] ** 0.9
    torch.testing.assert_close(scale[:2], raw / raw.prod() ** 0.5)
    assert scale[2:].tolist() == [1, 1]
    assert scale_of(torch.zeros(2), torch.ones(2), 0.1).tolist() == [1, 1]


def test_plain_norms_keep_their_ranks_whatever_the_scale():
    """|x s| ||W / s|| = |x| ||W||: without int8 the scale changes nothing, but for near ties."""
    options = {"scoring": "norm", "int8_roles": (), "coverage": 1.0}
    scaled, plain = logits(program(**options)), logits(program(direction="none", **options))
    assert (scaled - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_a_profile_replays_bit_equal_in_a_new_process(tmp_path):
    made = program(factors_from="original")
    assert_replays(made, logits(made), "tests.profiles.test_outstanding", tmp_path)


def test_a_profile_without_its_scales_is_refused():
    profile = program().profile.model_copy(deep=True)
    profile.tensors.clear()
    with pytest.raises(InvalidArgument, match="the profile has no tensor"):
        gw.optimize(captured_llama(), profile=profile, progress=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"alpha": 1.5}, "alpha"), ({"direction": "up"}, "direction"), ({"pattern": (9, 8)}, "got n=9 of m=8")],
)
def test_wrong_options_are_refused_by_name(options, reason):
    with pytest.raises(GraphwrightError, match=reason):
        OutstandingSparse(**options)
