"""Several methods at one site: which go together, in which order, and what they are together."""

from __future__ import annotations

import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument
from tests.tiny_wan import LAYERS, captured, sampler
from tests.video_models import make

RIPPLE = gw.TimeRipple(theta=(0.05, 0.1), granularity="element")
SPARSE = {
    "rainfusion": gw.RainFusion(dense_steps=0.4),
    "compact_attention": gw.CompactAttention(dense_steps=0.4, cost=1.0, bucket=9),
}


def kept(program):
    return [decision for decision in program.decisions if decision.status == "kept"]


@pytest.mark.parametrize("name", SPARSE)
def test_timeripple_goes_before_the_sparse_methods(name, tmp_path):
    methods = [RIPPLE, SPARSE[name]]
    program = gw.optimize(captured(), methods=methods, calibration=[sampler], keep="smaller", progress=False)
    joined = [d for d in kept(program) if d.method == f"timeripple+{name}"]
    assert joined
    assert {d.pass_name for d in joined} <= {"route_heads", "keep_windows"}
    assert all({"recall", "saving"} <= d.figures.keys() for d in joined)
    calls = [str(n.target) for n in program.phases[joined[0].phase].exported.graph.nodes]
    assert calls.count("graphwright.snap_tokens.default") == 2 * LAYERS
    assert calls.count("graphwright.block_sparse_attention.default") == LAYERS
    alone = [d for d in kept(program) if d.method == "timeripple"]
    assert {d.pass_name for d in alone} == {"reuse_scores"}  # in the steps that the other one leaves dense
    program.profile.save(tmp_path / "profile.json")
    replayed = gw.optimize(captured(), profile=tmp_path / "profile.json", progress=False)
    assert torch.equal(sampler(replayed), sampler(program))


@pytest.mark.parametrize("name", SPARSE)
def test_the_other_order_is_refused_and_says_so(name):
    methods = [SPARSE[name], RIPPLE]
    with pytest.raises(InvalidArgument, match=f"{name} and timeripple would both rewrite .* give timeripple first"):
        gw.optimize(captured(), methods=methods, calibration=[sampler], keep="smaller", progress=False)


def test_both_together_are_the_sparse_method_on_snapped_tokens():
    """Full block lists leave the snapped attention as it is."""
    model, inputs = make("wan", 5, 8, 8)
    everywhere = gw.capture_denoiser(model, inputs)
    ripple = gw.TimeRipple(theta=(0.3, 0.3), granularity="element", dense_steps=0.0, dense_tail=0.0)
    full = gw.RainFusion(sparsity=1e-9, alpha=0.0, dense_steps=0.0)
    alone, both = (
        gw.optimize(everywhere, methods=methods, keep="smaller", progress=False)
        for methods in ([ripple], [ripple, full])
    )
    assert [d.pass_name for d in kept(both)] == ["route_heads"]
    torch.testing.assert_close(both(**inputs), alone(**inputs), rtol=1e-4, atol=1e-5)


def test_two_methods_that_do_not_go_together_are_named():
    methods = list(SPARSE.values())
    with pytest.raises(InvalidArgument, match=r"rainfusion and compact_attention would both rewrite .* choose one"):
        gw.optimize(captured(), methods=methods, calibration=[sampler], keep="smaller", progress=False)
