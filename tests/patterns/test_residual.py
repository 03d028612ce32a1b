"""Residual streams: what writes and reads them in real forms of models, and what makes a rotation illegal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphwright.passes.canonicalize import canonicalize
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from graphwright.patterns.residual import find_streams
from graphwright.prepare import prepare
from tests.graph_text import functional
from tests.models import captured_llama

WIDTH, VOCABULARY = 16, 11


class Stream(nn.Module):
    """Embedding, two blocks of norm and linears, head; `change` names one thing that is done otherwise."""

    def __init__(self, change: str = "", norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change = change
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        for each in self.norms:
            nn.init.normal_(each.weight, 1.0, 0.2)
            if getattr(each, "bias", None) is not None:
                nn.init.normal_(each.bias)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.extra = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.position = nn.Embedding(5, WIDTH)
        if change == "tied":
            self.head.weight = self.embedding.weight
        if change == "tied through a view":
            self.head.weight = nn.Parameter(self.embedding.weight.data[:])

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.embedding(tokens)
        change = self.change
        h = h + self.extra if change == "learned position" else h
        h = h + self.position(torch.arange(5)) if change == "position embedding" else h
        h = h * 4.0 if change == "scaled" else h
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            written = down(torch.relu(up(norm(h))))
            written = written * self.gain if change == "scale per channel" else written
            written = norm(written) if change == "post-norm" else written
            written = torch.tanh(written) if change == "nonlinear" else written
            h = h + written
        if change == "sliced":
            h = h[:, -1:]
        read = self.norms[2](h)
        y = self.head(read)
        if change == "relu of the norm":
            return self.head(torch.relu(read))
        if change == "read without a norm":
            return y + self.head(h)
        if change == "stream is an output":
            return y, h
        return (y, read) if change == "norm is an output" else y


def streams(model: nn.Module):
    exported = functional(model, torch.randint(0, VOCABULARY, (2, 5)))
    canonicalize(exported)
    return find_streams(GraphView(exported))


@pytest.mark.parametrize("change", ["", "tied", "tied through a view", "position embedding", "scaled", "sliced"])
def test_a_stream_with_its_writers_and_readers(change):
    found = streams(Stream(change))
    (site,) = found.sites
    assert found.refusals == ()
    assert site.id == "main/residual[0]"
    assert (site.width, site.form) == (WIDTH, "rms_norm")
    assert len(site.embeddings) == (2 if change == "position embedding" else 1)
    assert len(site.writers) == 2
    assert [len(linears) for _, linears in site.norms] == [1, 1, 1]
    assert site.describe()["readers"] == "3 norms, 3 linears"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("learned position", "a stored tensor is added to the stream (width=16, tensor=extra)"),
        ("scale per channel", "the stream is scaled per channel or gated"),
        ("post-norm", "a norm writes to the stream, and its gain is per channel"),
        ("nonlinear", "the stream is written by something that is no linear"),
        ("relu of the norm", "a norm is read by something that is no linear"),
        ("read without a norm", "the stream is read by something that is no norm"),
        ("stream is an output", "the stream itself is an output"),
        ("norm is an output", "a norm of the stream is an output"),
    ],
)
def test_what_makes_a_rotation_illegal(change, reason):
    found = streams(Stream(change))
    assert found.sites == ()
    assert found.nearest_miss is not None
    assert reason in str(found.nearest_miss)


def test_layer_norms_are_said_to_be_such():
    (site,) = streams(Stream(norm=nn.LayerNorm)).sites
    assert site.form == "layer_norm"


def test_a_norm_of_something_that_is_never_added_to_is_no_stream():
    found = streams(nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3)))
    assert found.sites == ()
    assert found.refusals == ()


def test_the_ids_are_those_of_every_phase():
    prepared = prepare(captured_llama())
    for name, exported in prepared.exported.items():
        (site,) = find_sites(GraphView(exported), name).residual
        assert site.id == f"{name}/residual[0]"
        assert (len(site.writers), len(site.readers)) == (4, 11)
