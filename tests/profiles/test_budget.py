"""Budgets: the search for the fewest rollbacks, the order of rollback, and the figures behind it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphwright.kernels.int8_linear import quantize_per_channel
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import run_functional
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from graphwright.patterns.text import graph_text
from graphwright.profiles.budget import fewest_rollbacks, gains, places_by_harm
from graphwright.profiles.measure import measure_sites, output_errors, relative_error
from tests.graph_text import functional


@settings(deadline=None)
@given(total=st.integers(0, 300), data=st.data())
def test_the_least_number_is_found_in_few_measurements(total, data) -> None:
    needed = data.draw(st.integers(0, total))
    places = [str(number) for number in range(total)]
    calls = []

    def score(rolled_back) -> float:
        assert list(rolled_back) == places[: len(rolled_back)], "always from the front"
        calls.append(len(rolled_back))
        return float(len(rolled_back))

    count, seen = fewest_rollbacks(places, score, lambda value: value >= needed)
    assert count == needed
    assert [number for number, _, _ in seen] == calls
    assert all(ok == (number >= needed) for number, _, ok in seen)
    assert len(set(calls)) == len(calls), "nothing is measured twice"
    assert len(calls) <= 2 * math.log2(max(total, 1)) + 2


def test_a_budget_that_nothing_holds_rolls_back_everything() -> None:
    assert fewest_rollbacks(["a", "b", "c"], lambda places: 0.0, lambda score: False)[0] == 3


def decision(
    place: str, local: float | None, gain: float, output: float | None = None, phase: str = "main"
) -> Decision:
    return Decision(
        site=f"{phase}/{place}",
        method="int8",
        pass_name="quantize_linear",
        predicted_gain=gain,
        local_error=local,
        output_error=output,
    )


def test_most_error_goes_first() -> None:
    assert places_by_harm([decision("a", 0.1, 1), decision("b", 0.3, 1), decision("c", 0.2, 1)]) == ["b", "c", "a"]


def test_error_counts_for_its_gain() -> None:
    assert places_by_harm([decision("a", 0.2, 1.0), decision("b", 0.1, 0.1)]) == ["b", "a"]
    assert places_by_harm([decision("a", 0.2, 0.1), decision("b", 0.1, 0.1)]) == ["a", "b"]


def test_a_measured_effect_on_the_output_outweighs_a_local_error() -> None:
    """a has the larger local error, b the larger effect; the others are estimated with the ratio of the two."""
    chosen = [decision("a", 0.4, 1, 0.01), decision("b", 0.1, 1, 0.05), decision("c", 0.01, 1)]
    assert places_by_harm(chosen) == ["b", "a", "c"]
    assert places_by_harm([*chosen, decision("d", 0.2, 1)])[0] == "d", "0.2 x 0.5 is more than 0.05"


def test_a_place_is_as_harmful_as_in_its_worst_phase() -> None:
    three = [decision("a", 0.1, 1), decision("b", 0.12, 1), decision("a", 0.2, 0.0, phase="decode")]
    assert places_by_harm(three) == ["a", "b"]
    assert places_by_harm(three[:2]) == ["b", "a"]


def test_equal_harm_is_ordered_by_name() -> None:
    assert places_by_harm([decision("b", 0.1, 1), decision("a", 0.1, 1)]) == ["a", "b"]
    assert places_by_harm([]) == []


def test_gains_are_shares_of_a_phase() -> None:
    chosen = [decision("a", 0, 0.5), decision("b", 0, 0.25), decision("a", 0, 0.7, phase="decode")]
    assert gains(chosen) == pytest.approx((0.75 + 0.7) / 2)
    assert gains(chosen, ["a"]) == pytest.approx(0.125)
    assert gains([]) == 0.0


# ---- the figures


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


def proposals(exported) -> list[Decision]:
    sites = find_sites(GraphView(exported), "main").linear
    return [Decision(site=site.id, method="int8", pass_name="quantize_linear") for site in sites]


@pytest.fixture(scope="module")
def two():
    exported = functional(Two(), torch.randn(8, 64))
    canonicalize(exported)
    return exported, proposals(exported)


def int8(x, weight, bias):
    """The operator's formula, in the open: weights per row, activations per token."""
    values, scale = quantize_per_channel(weight)
    step = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / step).round()
    return (rounded.double() @ values.double().T * (step.double() * scale.double())).float() + bias


def test_site_errors_are_those_of_a_direct_computation(two) -> None:
    exported, decisions = two
    model, x = Two(), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    before = graph_text(exported)
    measured, failed = measure_sites(exported, "main", decisions, [[x]], {}, {})
    assert not failed
    assert graph_text(exported) == before
    hidden = model.up(x).relu().detach()
    for site, linear, source in zip(decisions, (model.up, model.down), (x, hidden), strict=True):
        reference = linear(source).detach()
        rounded = int8(source, linear.weight.detach(), linear.bias.detach())
        expected = float((rounded - reference).norm() / reference.norm())
        # Division by the step against multiplication with its inverse may round one value in thousands differently.
        assert measured[site.site].error == pytest.approx(expected, rel=1e-2)
        assert measured[site.site].before > 0
        assert measured[site.site].after > 0


def test_errors_of_several_inputs_are_taken_together(two) -> None:
    exported, decisions = two
    inputs = [[torch.randn(8, 64)], [torch.randn(8, 64) * 100]]
    each = [measure_sites(exported, "main", decisions, [flat], {}, {}, repeats=1)[0] for flat in inputs]
    both = measure_sites(exported, "main", decisions, inputs, {}, {}, repeats=1)[0]
    site, up = decisions[0].site, Two().up
    lengths = [float(up(flat[0]).detach().norm()) ** 2 for flat in inputs]
    expected = sum(m[site].error ** 2 * n for m, n in zip(each, lengths, strict=True)) / sum(lengths)
    assert both[site].error == pytest.approx(math.sqrt(expected), rel=1e-4)


def test_output_errors_are_of_one_site_at_a_time(two) -> None:
    exported, decisions = two
    x = torch.randn(8, 64)
    steps = []
    errors = output_errors(exported, "main", decisions, [[x]], {}, lambda: steps.append(1))
    assert len(steps) == len(errors) == 2
    reference = run_functional(exported, [x])
    for chosen in decisions:
        alone = copy_exported(exported)
        apply_decisions(alone, "main", [chosen]).commit()
        expected = relative_error(exported, [reference], [run_functional(alone, [x])])
        assert errors[chosen.site] == pytest.approx(expected, rel=1e-5)


def test_neighbouring_sites_are_both_rewritten() -> None:
    """The second linear's input is the first one's output, with nothing between."""
    exported = functional(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(4, 64))
    canonicalize(exported)
    apply_decisions(exported, "main", proposals(exported)).commit()
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == ["graphwright.int8_linear.default"] * 3
