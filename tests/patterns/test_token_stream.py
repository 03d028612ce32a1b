"""What belongs to the tokens of an attention, and how each of its readers takes them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from graphwright.kernels import block_sparse_attention  # noqa: F401 (registers the operator)
from graphwright.patterns.graph import GraphView
from graphwright.patterns.token_stream import Part, Place, TokenStream
from tests.graph_text import functional

N, TEXT = 12, 4


class Model(torch.nn.Module):
    """Video and text, joined for an attention whose order puts the video first."""

    order: Tensor
    table: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order.int()[None])
        self.register_buffer("table", torch.randn(N - TEXT, 6))

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.cat([text, video * self.table], 1).unflatten(2, (2, 3)).transpose(1, 2)
        lists = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
        y = torch.ops.graphwright.block_sparse_attention(
            q, q, q, *lists, q.new_zeros(1, 2, dtype=torch.int32), self.order, None, key_blocks=0, block_size=64
        )
        picked = q.index_select(2, self.order[0, 2:5])
        return y.transpose(1, 2).flatten(2)[:, TEXT:].cumsum(1), y.sum(2).unsqueeze(2) + picked


def stream(order: Tensor) -> tuple[TokenStream, dict[str, list[Node]]]:
    exported = functional(Model(order), torch.randn(1, N - TEXT, 6), torch.randn(1, TEXT, 6))
    nodes: dict[str, list[Node]] = {}
    for node in exported.graph.nodes:
        nodes.setdefault(str(node.target).split(".")[-2 if "." in str(node.target) else 0], []).append(node)
    return TokenStream(GraphView(exported), order, nodes["block_sparse_attention"]), nodes


VIDEO_FIRST = torch.cat([torch.tensor([9, 4, 6, 11, 5, 7, 10, 8]), torch.arange(TEXT)])


def test_places_are_found_with_their_part_of_the_tokens() -> None:
    found, nodes = stream(VIDEO_FIRST)
    (joined,) = nodes["cat"]
    assert found.places[joined] == Place(1, 0, N)
    text, video = joined.all_input_nodes
    assert found.places[text] == Place(1, 0, TEXT)
    assert found.places[video] == Place(1, TEXT, N - TEXT)
    assert found.places[nodes["block_sparse_attention"][0]] == Place(2, 0, N)
    table = next(node for node in found.places if found.view.target(node) == "table")
    assert found.places[table] == Place(0, TEXT, N - TEXT)
    assert found.is_constant(table)
    assert {table, text} <= found.pinned
    assert found.is_free(text), "text keeps its order among itself"
    assert not found.is_free(video)


def test_orders_of_parts() -> None:
    found, _ = stream(VIDEO_FIRST)
    assert found.order_of(Place(0, 0, N)).tolist() == VIDEO_FIRST.tolist()
    assert found.order_of(Place(0, TEXT, N - TEXT)).tolist() == [5, 0, 2, 7, 1, 3, 6, 4]
    assert found.order_of(Place(0, 0, TEXT)).tolist() == [0, 1, 2, 3]


def test_joins_are_turned_around_and_cuts_move() -> None:
    found, nodes = stream(VIDEO_FIRST)
    (joined,) = nodes["cat"]
    text, video = joined.all_input_nodes
    assert found.parts(joined, ordered=False) == (Part(text, 1, 0, TEXT), Part(video, 1, 0, N - TEXT))
    assert found.parts(joined, ordered=True) == (Part(video, 1, 0, N - TEXT), Part(text, 1, 0, TEXT))
    cut = next(node for node in nodes["slice"] if node in found.places)
    source = cut.all_input_nodes[0]
    assert found.parts(cut, ordered=False) == (Part(source, 1, TEXT, N - TEXT),)
    assert found.parts(cut, ordered=True) == (Part(source, 1, 0, N - TEXT),)
    assert not {joined, cut} & found.pinned


def test_a_scattered_order_leaves_no_runs() -> None:
    found, nodes = stream(torch.arange(N).reshape(2, N // 2).T.flatten())
    (joined,) = nodes["cat"]
    assert joined in found.pinned
    assert found.parts(joined, ordered=False) is not None


def test_readers() -> None:
    found, nodes = stream(VIDEO_FIRST)
    kinds = Counter(reader.kind for node in found.places for reader in found.readers(node))
    assert kinds["gather"] == found.gathers() == 1
    assert kinds["summed"] == 1
    assert kinds["model"] == 1
    (query,) = {node for node in found.places if any(r.kind == "gather" for r in found.readers(node))}
    (picked,) = nodes["index_select"]
    assert found.gathered(query, picked) == 2
    (attention,) = nodes["block_sparse_attention"]
    assert [reader.kind for reader in found.roles(query, attention)] == ["tokens"]
    (cumsum,) = nodes["cumsum"]
    assert [reader.kind for reader in found.roles(cumsum.args[0], cumsum)] == ["model"]


@pytest.mark.parametrize(
    ("index", "start"),
    [([6, 11, 5], 2), ([9], 0), (VIDEO_FIRST.tolist(), 0), ([4, 9], None), ([11, 5, 5], None), ([6, 5], None)],
)
def test_only_neighbours_of_the_order_are_gathered(index: list[int], start: int | None) -> None:
    class Picks(Model):
        picked: Tensor

        def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            y, _ = super().forward(video, text)
            joined = torch.cat([text, video * self.table], 1)
            return y, joined.index_select(1, self.picked)

    model = Picks(VIDEO_FIRST)
    model.register_buffer("picked", torch.tensor(index))
    exported = functional(model, torch.randn(1, N - TEXT, 6), torch.randn(1, TEXT, 6))
    (attention,) = [node for node in exported.graph.nodes if "block_sparse" in str(node.target)]
    found = TokenStream(GraphView(exported), VIDEO_FIRST, [attention])
    picks = [node for node in exported.graph.nodes if "index_select" in str(node.target)]
    joined = picks[-1].args[0]
    assert isinstance(joined, Node)
    # A second join of the same tokens: it is found from what it joins.
    assert joined in found.places
    assert found.gathered(joined, picks[-1]) == start
