"""A wanted saving is found on calibration inputs and counted when the program runs; reuse against leaving out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import graphwright as gw
from graphwright.errors import InvalidArgument
from graphwright.kernels.snap_tokens import saved_share, snap_tokens
from graphwright.passes.dialects import graph_arguments
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from graphwright.profiles.reuse_thresholds import Counts, find_theta
from tests.tiny_wan import LAYERS, STEPS, captured, sampler


@pytest.mark.parametrize("granularity", ["element", "token"])
def test_a_wanted_saving_is_found_and_counted_step_by_step(granularity):
    method = gw.TimeRipple(saving=0.4, granularity=granularity)
    program = gw.optimize(captured(), methods=[method], calibration=[sampler], keep="smaller", progress=False)
    low, high = program.profile.measured["timeripple"]["theta"]
    assert low == pytest.approx(0.4 * high)
    reuse = program.history.measured["reuse"]
    # Calibrated on one call of each range of steps, counted on all.
    assert reuse["saving"] == pytest.approx(0.4, abs=0.04)
    assert [step["saving"] == 0 for step in reuse["steps"]] == [True, *[False] * (STEPS - 2), True]
    assert reuse["saving"] == pytest.approx(sum(step["saving"] for step in reuse["steps"]) / STEPS, abs=1e-3)
    for step in reuse["steps"][1:-1]:
        assert len(step["layers"]) == LAYERS
        assert step["saving"] == pytest.approx(sum(step["layers"].values()) / LAYERS, abs=1e-3)
        weights = {"t": 24, "h": 20, "w": 20}
        assert step["saving"] == pytest.approx(sum(step["groups"][g] * w for g, w in weights.items()) / 64, abs=1e-3)
    report = str(program.report())
    assert "of their arithmetic saved" in report
    assert "t channels" in report
    kept = [decision for decision in program.decisions if decision.status == "kept"]
    assert 0 < kept[-1].predicted_gain < 1


def test_more_than_can_be_saved_is_refused_with_what_can():
    with pytest.raises(InvalidArgument, match=r"0.9 over the whole sampling cannot be reached.* it is 0\.6"):
        gw.optimize(captured(), methods=[gw.TimeRipple(saving=0.9)], calibration=[sampler], progress=False)


def test_counts_give_the_saving_at_any_threshold():
    thresholds = 281
    below = torch.linspace(0, 1, thresholds).double().expand(2, 3, -1)
    counts = Counts(below, below[:1])
    assert counts.saving(0.0) == 0.0
    assert counts.saving(1e9) == 1.0
    # The grid is logarithmic from 1e-4 to 1e3: 10 ** -0.5 is its middle.
    assert counts.saving(10**-0.5) == pytest.approx(0.75)
    assert find_theta(counts.saving, 0.75) == pytest.approx(10**-0.5, rel=2e-3)


def test_reuse_loses_far_less_than_leaving_out():
    """The paper's first ablation, on a real layer in the last step: at equal saving, against zeros where reuse would
    be, and against zeros for the values that are smallest."""
    program = gw.optimize(captured(), progress=False)
    exported = program.phases["main"].exported
    site = [s for s in find_sites(GraphView(exported), "main").attention if s.attention == "self"][-1]
    operands = {}

    class Runner(torch.fx.Interpreter):
        def run_node(self, n):
            if n is site.node:
                operands["qkv"] = [self.env[x] for x in (site.query, site.key, site.value)]
            return super().run_node(n)

    calls = []
    sampler(lambda **called: calls.append(called) or program(**called))
    flat = program.dispatch(**calls[-1])[2]
    with torch.no_grad():
        Runner(exported.graph_module).run(*graph_arguments(exported, flat), enable_io_processing=False)
    q, k, v = operands["qkv"]
    grid = {"frames": 4, "height": 8, "width": 8, "first": 0, "axes": [0, 1, 2], "window": 2, "granularity": "element"}
    snapped, reused = zip(*(snap_tokens(x, torch.tensor([0.06]), [64], [1.0], **grid) for x in (q, k)), strict=True)
    assert 0.3 < float(saved_share(*reused, 256).mean()) < 0.9

    def smallest_zeroed(x, count):
        share = float(count.double().mean()) / 256
        limit = x.abs().flatten(2).quantile(share, -1)[..., None, None]
        return torch.where(x.abs() < limit, 0, x)

    dense = F.scaled_dot_product_attention(q, k, v)

    def error(operands):
        query, key = operands
        return float((F.scaled_dot_product_attention(query, key, v) - dense).square().mean())

    reuse = error(snapped)
    low = error([smallest_zeroed(x, count) for x, count in zip((q, k), reused, strict=True)])
    skipped = error([torch.where(new != old, 0, new) for new, old in zip(snapped, (q, k), strict=True)])
    assert reuse < low / 1.5
    assert reuse < skipped / 100
