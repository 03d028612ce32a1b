"""Each rule holds: permuting what an operator reads along the token axis permutes its output, and nothing else does."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from graphwright.kernels import int8_linear  # noqa: F401 (registers the operator)
from graphwright.patterns.graph import GraphView
from graphwright.patterns.nodes import is_call, shape_of
from graphwright.patterns.token_axis import ALIKE, Read, reader_dim, reads, sizes_of, unordered
from graphwright.patterns.token_pieces import Piece, pieces
from graphwright.patterns.token_runs import token_runs
from graphwright.torch_private import pytree
from tests.graph_text import functional
from tests.video_models import VARIANTS, canonical

N = 5  # tokens
X = torch.randn(2, N, 6, generator=torch.Generator().manual_seed(0))


class Call(nn.Module):
    """A function of tensors as a module, with a weight [6, 6]."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, *args: Tensor) -> Any:
        return (
            self.function(*args, weight=self.weight) if self.function.__name__ == "weighted" else self.function(*args)
        )


def exported_call(function: Callable[..., Any], *args: Tensor) -> tuple[ExportedProgram, Node]:
    """A function as a program, and the call that makes its result."""
    exported = functional(Call(function), *(arg.clone() for arg in args))
    output: Any = exported.graph.output_node().args[0]
    return exported, output[0]


def last_call(function: Callable[..., Any], *args: Tensor) -> Node:
    """The call that makes a function's result."""
    return exported_call(function, *args)[1]


def weighted(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


TOKENWISE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int, list[int]]] = {
    "multiply": (lambda x, y: x * y, (X, X), 1, [1, 1]),
    "multiply itself": (lambda x: x * x, (X,), 1, [1, 1]),
    "broadcast over tokens": (lambda x, y: x * y, (X, X[:, :1]), 1, [1]),
    "broadcast over features": (lambda x, y: x * y, (X, X[..., :1]), 1, [1, 1]),
    "a table without batch": (lambda x, y: x * y, (X, X[0]), 1, [1, 0]),
    "where": (lambda c, x, y: torch.where(c > 0, x, y), (X[..., :1], X, X[0]), 1, [1, 1, 0]),
    "cast": (lambda x: x.to(torch.float64), (X,), 1, [1]),
    "copy": (lambda x, y: torch.ops.aten.copy(x, y), (X, X[:1]), 1, [1, 1]),
    "linear": (weighted, (X,), 1, [1]),
    "linear over the batch": (weighted, (X,), 0, [0]),
    "layer norm": (lambda x: F.layer_norm(x, (6,)), (X,), 1, [1]),
    "matmul, rows": (lambda x, y: x @ y, (X, X.mT), 1, [1]),
    "matmul, columns": (lambda x, y: x @ y, (X.mT, X), 2, [2]),
    "matmul, batch": (lambda x, y: x @ y, (X, X.mT), 0, [0, 0]),
    "matmul, batch of one side": (lambda x, y: x @ y, (X, X[0].mT), 0, [0]),
    "transpose": (lambda x: x.transpose(1, 2), (X,), 2, [1]),
    "permute": (lambda x: x.permute(2, 0, 1), (X,), 2, [1]),
    "heads": (lambda x: x.view(2, N, 2, 3), (X,), 1, [1]),
    "heads folded": (lambda x: x.reshape(2, N, 6), (X.view(2, N, 2, 3),), 1, [1]),
    "batch folded in front": (lambda x: x.reshape(2, 3, N, 2), (torch.randn(6, N, 2),), 2, [1]),
    "unsqueeze": (lambda x: x.unsqueeze(1), (X,), 2, [1]),
    "squeeze": (lambda x: x.squeeze(0), (X[:1],), 0, [1]),
    "squeeze of all": (lambda x: x.squeeze(), (X[:1],), 0, [1]),
    "expand": (lambda x: x[:, :, None].expand(2, N, 4, 6), (X,), 1, [1]),
    "expand to tokens": (lambda x: x.expand(2, N, 6), (X[:, :1],), 1, []),
    "repeat of others": (lambda x: x.repeat(1, 1, 2), (X,), 1, [1]),
    "repeat to tokens": (lambda x: x.repeat(1, N, 1), (X[:, :1],), 1, []),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 2), (X,), 1, [1]),
    "slice of others": (lambda x: x[..., 1:4], (X,), 1, [1]),
    "select of others": (lambda x: x[0], (X,), 0, [1]),
    "chunk of others": (lambda x: x.chunk(2, -1)[1], (X,), 1, [1]),
    "unbind of others": (lambda x: x.unbind(-1)[1], (X,), 1, [1]),
    "cat of others": (lambda x, y: torch.cat([x, y], -1), (X, X), 1, [1, 1]),
    "stack behind": (lambda x, y: torch.stack([x, y], -1), (X, X), 1, [1, 1]),
    "stack in front": (lambda x, y: torch.stack([x, y]), (X, X), 2, [1, 1]),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y, 2, 0, 6, 2), (X, X[..., :3]), 1, [1, 1]),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, 0, 1), (X, X[0]), 1, [1, 0]),
    "softmax over others": (lambda x: x.softmax(-1), (X,), 1, [1]),
    "cumsum over others": (lambda x: x.cumsum(0), (X,), 1, [1]),
    "flip of others": (lambda x: x.flip(2), (X,), 1, [1]),
    "sum over others": (lambda x: x.sum(0), (X,), 0, [1]),
    "mean kept": (lambda x: x.mean(-1, keepdim=True), (X,), 1, [1]),
    "largest": (lambda x: x.amax((0, 2)), (X,), 0, [1]),
    "pad of others": (lambda x: F.pad(x, (1, 2)), (X,), 1, [1]),
    "index_select of others": (lambda x, i: x.index_select(2, i), (X, torch.tensor([3, 1])), 1, [1]),
    "embedding": (lambda x, i: F.embedding(i, x), (X[0], torch.randint(0, N, (2, N))), 1, [1]),
    "complex": (lambda x: torch.view_as_complex(x), (X.view(2, N, 3, 2),), 1, [1]),
    "zeros like": (lambda x: torch.zeros_like(x), (X,), 1, []),
    "queries": (lambda q, k: F.scaled_dot_product_attention(q, k, k), (X, X), 1, [1]),
    "queries, one mask": (lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m), (X, X, X[:1, :1, :5]), 1, [1]),
    "queries and their masks": (
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m), (X, X, X[:, :, :5]), 1, [1, 1],
    ),
}  # fmt: skip
"""name -> function, inputs, the output's token dimension, the operands' ones in their order."""

MIXED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "convolution": (lambda x, w: F.conv1d(x, w, padding=1), (X, torch.randn(N, N, 3)), 1),
    "features": (weighted, (X,), 2),
    "norm over tokens": (lambda x: F.layer_norm(x, (N, 6)), (X,), 1),
    "cumsum": (lambda x: x.cumsum(1), (X,), 1),
    "softmax": (lambda x: x.softmax(1), (X,), 1),
    "flip": (lambda x: x.flip(1), (X,), 1),
    "roll of all": (lambda x: x.roll(1), (X,), 1),
    "merged with the batch": (lambda x: x.reshape(10, 6), (X,), 0),
    "another dimension of this length": (lambda x: x.reshape(2, 6, N), (X,), 2),
    "slice": (lambda x: x[:, 1:], (X,), 1),
    "cat": (lambda x, y: torch.cat([x, y], 1), (X, X), 1),
    "repeated": (lambda x: x.repeat(1, 2, 1), (X,), 1),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), (X,), 1),
    "padded": (lambda x: F.pad(x, (0, 0, 1, 0)), (X,), 1),
    "new dimension": (lambda x: torch.stack([x] * N, 1), (X,), 1),
    "causal": (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), (X, X), 1),
    "random": (lambda x: torch.rand_like(x), (X,), 1),
    "chosen tokens": (lambda x, i: x[:, i], (X, torch.arange(N)), 1),
}


@pytest.mark.parametrize("name", TOKENWISE)
def test_tokenwise_operators_name_what_they_read(name: str) -> None:
    function, args, dim, dims = TOKENWISE[name]
    node = last_call(function, *args)
    found = reads(node, dim)
    assert found is not None
    assert [read.dim for read in found] == dims
    holds(node, dim)
    for read in found:
        assert reader_dim(node, read.operand, read.dim) == dim


def test_our_linear_is_tokenwise() -> None:
    """Activations are quantized for each token by itself."""
    weight, scale = torch.randint(-9, 9, (3, 6), dtype=torch.int8), torch.rand(3)
    node = last_call(lambda x, w, s: torch.ops.graphwright.int8_linear(x, w, s, None), X, weight, scale)
    assert reads(node, 1) == (Read(node.all_input_nodes[0], 1),)
    assert reads(node, 2) is None
    holds(node, 1)


@pytest.mark.parametrize("name", MIXED)
def test_other_operators_have_no_reads(name: str) -> None:
    function, args, dim = MIXED[name]
    assert reads(last_call(function, *args), dim) is None


def test_a_rule_that_lies_is_found_out() -> None:
    """The check of this file can fail: a flip along the tokens is not token-wise."""
    node = last_call(lambda x: x.flip(1), X)
    with pytest.raises(AssertionError):
        permutes(node, 1, (Read(node.args[0], 1),))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("model", VARIANTS)
def test_all_reads_of_real_models_hold(model: str) -> None:
    """Every call of five families of models, along every dimension for which there is a rule."""
    checked = Counter()
    for node in canonical(model).graph.nodes:
        if node.op != "call_function" or not all(map(is_fixed, (node, *node.all_input_nodes))):
            continue
        for dim, size in enumerate(sizes_of(node)):
            if size > 1 and read_by_call(node, dim) is not None:
                holds(node, dim)
                checked[str(node.target)] += 1
    assert min(checked[f"aten.{name}"] for name in ("linear.default", "reshape.default", "mul.Tensor")) > 5, checked


UNORDERED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], list[list[int]]]] = {
    "keys and values": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (X, X, X), [[1, 1]]),
    "and a mask of keys": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (X, X, X, X[:1, :1, :5]), [[1, 1, 2]],
    ),
    "and a mask for each query": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (X, X, X, X[:, :, :5]), [[1, 1, 2]],
    ),
    "sum": (lambda x: x.sum(1), (X,), [[1]]),
    "mean of two": (lambda x: x.mean((0, -2), keepdim=True), (X,), [[0], [1]]),
    "causal": (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), (X, X), []),
    "cumsum": (lambda x: x.cumsum(1), (X,), []),
    "product of all": (lambda x: x.sum(), (X,), []),
}  # fmt: skip


@pytest.mark.parametrize("name", UNORDERED)
def test_sums_over_tokens_may_be_in_any_order(name: str) -> None:
    function, args, dims = UNORDERED[name]
    node = last_call(function, *args)
    groups = unordered(node)
    assert [[read.dim for read in group] for group in groups] == dims
    given = random_inputs(node)
    for group in groups:
        torch.testing.assert_close(computed(node, permuted(given, group)), computed(node, given))


PIECES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], list[tuple[int | None, int, int]]]] = {
    "cat": (lambda x, y: torch.cat([x, y], 1), (X, X[:, :2]), [(0, 0, 5), (1, 0, 2)]),
    "slice": (lambda x: x[:, 1:3], (X,), [(0, 1, 2)]),
    "slice from the end": (lambda x: x[:, -2:], (X,), [(0, 3, 2)]),
    "slice up to the end": (lambda x: x[:, :-2], (X,), [(0, 0, 3)]),
    "split": (lambda x: x.split([2, 3], 1)[1], (X,), [(0, 2, 3)]),
    "chunk": (lambda x: x.chunk(2, 1)[1], (X,), [(0, 3, 2)]),
    "scatter": (lambda x, y: torch.slice_scatter(x, y, 1, 1, 3), (X, X[:, :2]), [(0, 0, 1), (1, 0, 2), (0, 3, 2)]),
    "scatter at the end": (lambda x, y: torch.slice_scatter(x, y, 1, -2), (X, X[:, :2]), [(0, 0, 3), (1, 0, 2)]),
    "padding": (lambda x: F.pad(x, (0, 0, 0, 4)), (X,), [(0, 0, 5), (None, 0, 4)]),
    "padding in front": (lambda x: F.pad(x, (1, 1, 2, 0)), (X,), [(None, 0, 2), (0, 0, 5)]),
}


@pytest.mark.parametrize("name", PIECES)
def test_cuts_and_joins_name_their_pieces(name: str) -> None:
    function, args, expected = PIECES[name]
    node = last_call(function, *args)
    found = pieces(node, 1)
    assert found is not None
    given = random_inputs(node)
    inputs = [parent for parent in source_of(node).all_input_nodes if isinstance(parent.meta["val"], Tensor)]
    assert [(piece.operand and inputs.index(piece.operand), piece.start, piece.length) for piece in found] == expected
    joined = torch.cat([taken(piece, given, node) for piece in found], 1)
    torch.testing.assert_close(joined, computed(node, given))


@pytest.mark.parametrize(
    "function",
    [lambda x: x[:, ::2], lambda x: torch.cat([x, x], 2), lambda x: x.flip(1), lambda x: F.pad(x, (0, 0, -1, 0))],
)
def test_what_is_no_cut_has_no_pieces(function) -> None:
    assert pieces(last_call(function, X), 1) is None


def test_runs_say_where_tokens_come_from() -> None:
    def function(x: Tensor, y: Tensor, i: Tensor) -> Tensor:
        joined = torch.cat([x[:, 1:], y.transpose(1, 2).relu()], 1)
        return torch.cat([joined[:, :2], joined[:, 4:], y.transpose(1, 2)[:, i], joined[:, 2:4]], 1)

    exported, node = exported_call(function, X, X.mT, torch.tensor([3, 1, 1]))
    runs = token_runs(GraphView(exported), node, 1)
    x, y, _ = exported.graph.find_nodes(op="placeholder", sort=True)[-3:]
    assert [(run.source, run.dim, run.start, run.length) for run in runs[:2]] == [(x, 1, 1, 2), (y, 2, 0, 5)]
    assert is_call(runs[2].source, torch.ops.aten.index.Tensor)
    assert [(run.source, run.dim, run.start, run.length) for run in runs[3:]] == [(x, 1, 3, 2)]


# ---- checking a claim with numbers


def is_fixed(node: Node) -> bool:
    """Whether a node is a tensor of fixed size, or several."""
    values = node.meta.get("val")
    leaves = values if isinstance(values, list | tuple) else [values]
    return all(isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape) for value in leaves)


def source_of(node: Node) -> Node:
    """The split that a part was taken from; other nodes are their own."""
    return node.args[0] if is_call(node, operator.getitem) else node  # pyright: ignore[reportReturnType]


def random_inputs(node: Node) -> dict[Node, Tensor]:
    """Random values for what a call reads, such as its operator takes."""
    generator = torch.Generator().manual_seed(0)
    given = {}
    for parent in source_of(node).all_input_nodes:
        value = parent.meta["val"]
        if value.dtype.is_floating_point or value.dtype.is_complex:
            given[parent] = torch.randn(value.shape, dtype=value.dtype, generator=generator)
        else:
            given[parent] = torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)
    return given


def computed(node: Node, given: dict[Node, Tensor]) -> Any:
    """A call's value, or its split's part."""

    def call(step: Node) -> Any:
        args, kwargs = map_arg((step.args, step.kwargs), lambda n: given[n] if n in given else call(n))
        return step.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    return call(node)


def permuted(given: dict[Node, Tensor], group: Iterable[Read]) -> dict[Node, Tensor]:
    """The same with the tokens of some operands in another order."""
    changed = dict(given)
    for operand, dim in dict.fromkeys(group):
        changed[operand] = changed[operand].roll(1, dim).flip(dim)
    return changed


def read_by_call(node: Node, dim: int) -> tuple[Read, ...] | None:
    """What a call reads; of a part, what its split reads."""
    found = reads(node, dim)
    return reads(found[0].operand, found[0].dim) if found and is_call(node, operator.getitem) else found


def holds(node: Node, dim: int) -> None:
    """Permute what is read, and compare."""
    found = read_by_call(node, dim)
    assert found is not None
    permutes(node, dim, found)


def permutes(node: Node, dim: int, found: tuple[Read, ...]) -> None:
    given = random_inputs(node)
    if is_call(node, *ALIKE):
        return  # Some are not defined; none depends on its operand.
    before, after = (computed(node, values) for values in (given, permuted(given, found)))
    for x, y in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        torch.testing.assert_close(x.roll(1, dim).flip(dim), y, equal_nan=True)


def taken(piece: Piece, given: dict[Node, Tensor], like: Node) -> Tensor:
    """The tokens of a piece; padding is zeros."""
    if piece.operand is None:
        sizes = list(shape_of(like))
        sizes[piece.dim] = piece.length
        return torch.zeros(sizes)
    tokens = given[piece.operand].narrow(piece.dim, piece.start, piece.length)
    return F.pad(tokens, (1, 1)) if shape_of(like)[2] > tokens.shape[2] else tokens
