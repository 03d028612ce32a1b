"""Folding, untying and rotating: each is exact in float64, changes what it says, and refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright.errors import InvalidArgument
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.dialects import example_outputs, largest_difference, run_functional
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from graphwright.prepare import prepare, with_exact
from tests.graph_text import functional, operators
from tests.models import CACHE, tiny_llama
from tests.patterns.test_residual import VOCABULARY, WIDTH, Stream

EXACT = 1e-12
"""Largest difference over the largest value in float64: eps 2.2e-16, sums of up to 96 terms, a few linears deep."""


def rotation(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q


@pytest.fixture(scope="module")
def llama():
    import graphwright as gw

    return prepare(gw.capture_causal_lm(tiny_llama(tie_word_embeddings=True).double(), CACHE))


def decisions(sites, what: str) -> list[Decision]:
    def made(site, name, **options):
        return Decision(site=site.id, method="test", pass_name=name, options=options)

    (stream,) = sites.residual
    down = [site for site in sites.linear if site.role == "down"]
    return {
        "fold": [made(stream, "fold_norm")],
        "untie": [made(stream, "untie")],
        "fold and untie": [made(stream, "rotate")],
        "R1": [made(stream, "rotate", rotation="R1")],
        "R2": [made(site, "rotate_heads", values="R2") for site in sites.attention],
        "R3": [made(site, "rotate_heads", keys=True) for site in sites.attention],
        "R4": [made(site, "rotate_input") for site in down],
        "all": [
            made(stream, "rotate", rotation="R1"),
            *(made(site, "rotate_heads", values="R2", keys=True) for site in sites.attention),
            *(made(site, "rotate_input") for site in down),
        ],
    }[what]


TENSORS = {"R1": rotation(64, 64), "R2": rotation(2, 16, 16)}


@pytest.mark.parametrize("what", ["fold", "untie", "fold and untie", "R1", "R2", "R3", "R4", "all"])
def test_each_is_exact_in_every_phase(llama, what):
    for name, exported in llama.exported.items():
        copy = copy_exported(exported)
        rewriting = apply_decisions(copy, name, decisions(llama.sites[name], what), dict(TENSORS))
        assert not rewriting.failed
        rewriting.commit()
        before, after = example_outputs(exported)[-1:], example_outputs(copy)[-1:]
        assert largest_difference(before, after) < EXACT
        # What is found and what it is for must not change with the basis.
        sites = find_sites(GraphView(copy), name)
        assert [(s.id, s.role) for s in sites.linear] == [(s.id, s.role) for s in llama.sites[name].linear]
        assert len(sites.attention) == len(sites.cache) == 2
        if what in ("fold", "fold and untie", "R1", "all"):
            assert all(norm.weight is None for norm in sites.norm)
        if what != "R2" and what != "R3" and what != "R4":
            (head,) = [s for s in sites.linear if s.role == "head"]
            assert not head.shared_weight


def test_a_rotation_of_float32_is_exact_too(llama):
    """What a profile holds is orthogonal to 1e-7; the passes make it orthogonal to float64's precision."""
    tensors = {name: tensor.float() for name, tensor in TENSORS.items()}
    exported = llama.exported["prefill"]
    copy = copy_exported(exported)
    apply_decisions(copy, "prefill", decisions(llama.sites["prefill"], "all"), tensors).commit()
    assert largest_difference(example_outputs(exported)[-1:], example_outputs(copy)[-1:]) < EXACT


def test_an_identity_would_show_nothing():
    """The check can fail: with H on one side and its transpose on the other the numbers are others."""
    torch.manual_seed(0)
    exported = functional(Stream().double(), torch.randint(0, VOCABULARY, (2, 5)))
    canonicalize(exported)
    (site,) = find_sites(GraphView(exported), "main").residual
    copy = copy_exported(exported)
    apply_decisions(
        copy, "main", [Decision(site=site.id, method="t", pass_name="rotate", options={"rotation": "R"})],
        {"R": rotation(WIDTH, WIDTH)},
    ).commit()  # fmt: skip
    name = next(name for name in copy.state_dict if name.startswith("head"))
    copy.state_dict[name] = copy.state_dict[name] @ rotation(WIDTH, WIDTH)
    assert largest_difference(example_outputs(exported), example_outputs(copy)) > 0.01


@pytest.mark.parametrize("change", ["", "tied", "tied through a view", "position embedding", "scaled", "sliced"])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("pass_name", ["fold_norm", "rotate"])
def test_streams_of_all_forms(change, norm, pass_name):
    """LayerNorm too: writers lose their mean, gains and shifts go to the readers."""
    model = Stream(change, norm).double()
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    exported = functional(model, tokens)
    canonicalize(exported)
    (site,) = find_sites(GraphView(exported), "main").residual
    copy = copy_exported(exported)
    options = {"rotation": "R"} if pass_name == "rotate" else {}
    decision = Decision(site=site.id, method="t", pass_name=pass_name, options=options)
    apply_decisions(copy, "main", [decision], {"R": rotation(WIDTH, WIDTH)}).commit()
    before, after = run_functional(exported, [tokens]), run_functional(copy, [tokens])
    assert largest_difference(before, after) < EXACT
    assert "layer_norm" not in operators(copy)


def test_mixed_norms_are_refused():
    class Mixed(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.norms[1] = nn.LayerNorm(WIDTH)

    exported = functional(Mixed(), torch.randint(0, VOCABULARY, (2, 5)))
    canonicalize(exported)
    (site,) = find_sites(GraphView(exported), "main").residual
    decision = Decision(site=site.id, method="t", pass_name="fold_norm")
    assert "RMSNorms and LayerNorms" in apply_decisions(exported, "main", [decision]).failed[site.id]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (None, "the profile has no tensor R1"),
        (torch.eye(63), r"expected a float tensor \[64, 64\]"),
        (torch.eye(64) * 1.001, "R1 is not orthogonal: R\\^T R differs from I by 0.002"),
        (torch.full((64, 64), float("nan")), "R1 is not orthogonal"),
        (torch.eye(64, dtype=torch.int8), "expected a float tensor"),
    ],
)
def test_what_is_no_rotation_is_refused(llama, tensor, reason):
    llama.shared.pop("R1", None)
    if tensor is not None:
        llama.shared["R1"] = tensor
    wanted = [d for sites in llama.sites.values() for d in decisions(sites, "R1")]
    with pytest.raises(InvalidArgument, match=reason):
        with_exact(llama, wanted)
    llama.shared.pop("R1", None)


def test_untie_refuses_where_nothing_is_tied():
    exported = functional(Stream(), torch.randint(0, VOCABULARY, (2, 5)))
    canonicalize(exported)
    (site,) = find_sites(GraphView(exported), "main").residual
    decision = Decision(site=site.id, method="t", pass_name="untie")
    assert "no reader of the stream" in apply_decisions(exported, "main", [decision]).failed[site.id]
