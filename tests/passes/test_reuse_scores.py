"""The rewrite: what becomes of the graph, both forms against each other, and what its guard refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import run_functional
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView, Refusal
from graphwright.patterns.video import video_layout
from graphwright.torch_private import pytree
from tests.video_models import GRID, HEAD_DIM, canonical

OPTIONS = {"grid": list(GRID), "thetas": [0.5], "groups": [HEAD_DIM], "factors": [1.0]}


def rewritten(variant="wan", dynamic=False, **options):
    """The program with every video attention rewritten, and what was done."""
    exported = copy_exported(canonical(variant, dynamic))
    view = GraphView(exported)
    grid = options.get("grid", OPTIONS["grid"])
    places = [
        site.id
        for site in find_sites(view, "main", ("attention",)).attention
        if not isinstance(video_layout(view, site, tuple(grid)), Refusal)
    ]
    decisions = [
        Decision(site=place, method="test", pass_name="reuse_scores", options={**OPTIONS, **options})
        for place in places
    ]
    rewriting = apply_decisions(exported, "main", decisions)
    if rewriting.changes:
        rewriting.commit()
    return exported, rewriting


def ours(exported):
    return [str(n.target).removeprefix("graphwright.") for n in exported.graph.nodes if "graphwright" in str(n.target)]


def output(exported, **given):
    flat = pytree.tree_leaves(exported.example_inputs)
    for name, value in given.items():
        flat[list(exported.graph_signature.user_inputs).index(name)] = value
    return run_functional(exported, flat)[-1]


def test_the_graph_before_and_after():
    assert ours(rewritten()[0]) == ["snap_tokens.default", "snap_tokens.default"]
    collapsed, _ = rewritten(granularity="token", collapse=True)
    assert ours(collapsed) == ["token_roots.default", "token_roots.default", "collapsed_attention.default"]
    attentions = [n for n in collapsed.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert len(attentions) == 1  # cross-attention stays


@pytest.mark.parametrize("variant", ["wan", "cogvideox", "hunyuan", "ltx", "mochi of two"])
def test_both_forms_are_the_same_and_threshold_zero_is_dense(variant):
    snapped, _ = rewritten(variant, granularity="token")
    collapsed, _ = rewritten(variant, granularity="token", collapse=True)
    dense = output(canonical(variant))
    torch.testing.assert_close(output(collapsed), output(snapped), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(snapped), dense, rtol=1e-4, atol=1e-5)
    zero, _ = rewritten(variant, thetas=[0.0])
    assert torch.equal(output(zero), dense)


def test_text_is_never_reused():
    """With every cell constant the text's queries and keys are still its own."""
    exported, _ = rewritten("cogvideox", thetas=[1e30])
    seen = {}

    class Runner(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if "snap_tokens" in str(n.target):
                seen[n.name] = (self.fetch_args_kwargs_from_env(n)[0][0], result[0])
            return result

    flat = pytree.tree_leaves(exported.example_inputs)
    from graphwright.passes.dialects import graph_arguments

    Runner(exported.graph_module).run(*graph_arguments(exported, flat), enable_io_processing=False)
    assert len(seen) == 2
    for before, after in seen.values():
        assert torch.equal(after[:, :, :7], before[:, :, :7])
        assert not torch.equal(after[:, :, 7:], before[:, :, 7:])


def test_the_threshold_is_that_of_the_step():
    """Steps at 900, 500 and 100 with edges between: infinite, none, some."""
    options = {"edges": [700.0, 300.0], "timestep": "timestep"}
    exported, _ = rewritten(thetas=[1e30, 0.0, 0.5], **options)
    for timestep, theta in ((900.0, 1e30), (500.0, 0.0), (100.0, 0.5), (0.0, 0.5), (1000.0, 1e30)):
        given = {"inputs_timestep": torch.tensor([timestep])}
        alone, _ = rewritten(thetas=[theta])
        assert torch.equal(output(exported, **given), output(alone, **given)), timestep


def test_a_dynamic_number_of_frames():
    grid = [None, *GRID[1:]]
    static, _ = rewritten()
    dynamic, _ = rewritten(dynamic=True, grid=grid)
    assert ours(dynamic) == ["snap_tokens.default", "snap_tokens.default"]
    torch.testing.assert_close(output(dynamic), output(static))
    collapsed, rewriting = rewritten(dynamic=True, grid=grid, granularity="token", collapse=True)
    assert not rewriting.failed
    torch.testing.assert_close(output(collapsed), output(rewritten(granularity="token")[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"grid": [3, 4]}, "the grid must be"),
        ({"thetas": []}, "got 0 thresholds and 0 edges"),
        ({"thetas": [0.1, 0.2]}, "got 2 thresholds and 0 edges"),
        ({"thetas": [0.1, 0.2, 0.3], "edges": [1.0, 2.0], "timestep": "timestep"}, "must fall"),
        ({"thetas": [0.1, 0.2], "edges": [500.0], "timestep": "sigma"}, "no input 'sigma'"),
        ({"groups": [HEAD_DIM - 1]}, "channels, expected 32 together"),
        ({"factors": [1.0, 2.0]}, "got 2 factors for 1 groups"),
        ({"window": 1}, "window=1, expected at least 2"),
        ({"granularity": "row"}, "got granularity 'row'"),
        ({"collapse": True}, "only whole tokens can be left out"),
    ],
)
def test_the_guard_says_what_does_not_fit(options, reason):
    exported = copy_exported(canonical("wan"))
    site = next(
        s.id for s in find_sites(GraphView(exported), "main", ("attention",)).attention if s.attention == "self"
    )
    decision = Decision(site=site, method="test", pass_name="reuse_scores", options={**OPTIONS, **options})
    failed = apply_decisions(exported, "main", [decision]).failed
    assert reason in failed[site]


def test_an_attention_over_no_grid_is_refused():
    class Plain(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    exported = torch.export.export(Plain(), tuple(torch.randn(3, 1, 2, 71, 32))).run_decompositions({})
    (site,) = find_sites(GraphView(exported), "main", ("attention",)).attention
    decision = Decision(site=site.id, method="test", pass_name="reuse_scores", options=OPTIONS)
    assert "72 tokens, as the grid asks for" in apply_decisions(exported, "main", [decision]).failed[site.id]
