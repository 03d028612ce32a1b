"""Orders of sparse attentions leave them: what is permuted instead, where, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

import graphwright as gw
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.kernels import block_sparse_attention  # noqa: F401 (registers the operator)
from graphwright.kernels.token_order import token_order
from graphwright.passes.canonicalize import CANONICALIZERS
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.drop_noops import DropNoops
from graphwright.passes.edit import Edit
from graphwright.passes.hoist_order import HoistOrder
from graphwright.passes.manager import PassManager, PassRecord
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.attention import find_attention
from graphwright.patterns.graph import GraphView
from graphwright.patterns.nodes import aten, dtype_of
from graphwright.patterns.video import VideoLayout, video_layout
from tests.graph_text import check_text, functional, operators
from tests.video_models import canonical

BLOCK = 64


def hoist(exported: ExportedProgram) -> PassRecord:
    """Run the pass under the manager, which compares the outputs on the example inputs."""
    (record,) = PassManager([HoistOrder()]).run(exported)
    return record


def random_lists(heads: int, tokens: int) -> tuple[Tensor, Tensor, int]:
    """Counts and blocks of lists that keep a third of the whole blocks, for each head: the order of tokens counts."""
    governed = tokens // BLOCK
    keep = torch.rand(heads, governed, governed, generator=torch.Generator().manual_seed(1)) < 0.3
    return keep.sum(-1).int(), torch.argsort(~keep, dim=-1, stable=True).int(), governed


def sparsify(exported: ExportedProgram, *, kind: Any = "tile", dense: tuple[int, ...] = ()) -> int:
    """Rewrite video attention to random lists over ordered tokens, but for the sites `dense`; count them."""
    edit, rewritten = Edit(exported), 0
    for number, site in enumerate(find_attention(edit.view).sites):
        layout = video_layout(edit.view, site)
        if not isinstance(layout, VideoLayout) or number in dense:
            continue
        counts, blocks, governed = random_lists(site.heads, site.queries)
        shape = {"tile": (1, 2, 2), "window": (2, 2)}.get(kind, ())
        place = {"first": layout.first, "text": layout.text, "shape": shape}
        order = token_order(kind, layout.frames, layout.height, layout.width, **place)[None].clone()
        stored = {"counts": counts, "blocks": blocks, "order": order}
        nodes = [edit.buffer(f"test.{name}.{kind}", lambda t=t: t.clone()) for name, t in stored.items()]
        bias = layout.key_mask
        if bias is not None:
            assert dtype_of(bias) is torch.bool
            bias = edit.call(aten.logical_not.default, bias, like=site.node)
            bias = edit.call(aten._to_copy.default, bias, dtype=torch.float32, like=site.node)
            bias = edit.call(aten.mul.Tensor, bias, -1e9, like=site.node)
            bias = edit.call(aten.squeeze.dim, bias, 2, like=site.node)
        output = edit.call(
            torch.ops.graphwright.block_sparse_attention.default,
            *(site.query, site.key, site.value, nodes[0], nodes[1], None, nodes[2], bias),
            key_blocks=governed,
            block_size=BLOCK,
            like=site.node,
        )
        edit.replace(site.node, output)
        rewritten += 1
    edit.finish()
    return rewritten


def orders(exported: ExportedProgram) -> list[Any]:
    """The order of each sparse attention that is left."""
    return [node.args[6] for node in exported.graph.nodes if "block_sparse_attention" in str(node.target)]


# ---- whole models


@pytest.fixture(scope="module")
def wan() -> ExportedProgram:
    """The trained model, with eight sparse attentions over 4 x 8 x 8 tokens in tiles."""
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 12, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": load_prompts()["bikes"],
    }
    exported = copy_exported(gw.capture_denoiser(load_tiny_wan(), inputs).exported)
    PassManager(CANONICALIZERS, check_numbers=False).run(exported)
    return exported


def test_one_permutation_in_and_one_out(wan) -> None:
    exported = copy_exported(wan)
    assert sparsify(exported) == 8
    record = hoist(exported)
    assert record.changed == 30
    assert record.difference is not None
    assert record.difference < 1e-5  # sixteen sums of 256 products in another order
    assert [str(refusal) for refusal in record.refusals] == ["2 permutations remain of 32"]
    assert orders(exported) == [None] * 8
    check_text(
        exported,
        """
        CHECK:      %[[T:.*]]: float32[1, 256, 256] = aten.transpose.int(
        CHECK-NEXT: %[[X:.*]]: float32[1, 256, 256] = aten.index_select.default(%[[T]], 1, token_index.
        CHECK:      aten.layer_norm.default(%[[X]], [256]
        CHECK:      aten.mul.Tensor(%{{.*}}, positions.ordered.
        CHECK:      aten.add.Tensor(%[[X]],
        CHECK:      %[[Y:.*]]: float32[1, 256, 48] = aten.linear.default({{.*}} model.proj_out.weight
        CHECK-NEXT: %[[Z:.*]]: float32[1, 256, 48] = aten.index_select.default(%[[Y]], 1, token_index.
        CHECK-NEXT: aten.reshape.default(%[[Z]], [1, 4, 8, 8, 1, 2, 2, -1])
        """,
    )
    stored = [name for name in exported.state_dict if ".ordered." in name]
    assert len(stored) == 2, "cosines and sines are stored in order, once for all layers"
    assert not any("test.order" in name for name in exported.state_dict)
    assert hoist(exported).changed == 0, "there is nothing left to do"


def test_dense_attentions_between_are_no_hindrance(wan) -> None:
    """Self attention sums over its keys, in any order."""
    exported = copy_exported(wan)
    assert sparsify(exported, dense=(4, 6)) == 6  # each block has a self and a cross attention
    assert str(hoist(exported).refusals[0]) == "2 permutations remain of 24"
    assert orders(exported) == [None] * 6


def test_choices_by_the_order_become_slices(wan) -> None:
    """RainFusion 2.0 takes means of blocks, for which it permutes queries and keys by itself."""
    exported = copy_exported(wan)
    sites = [site for site in find_attention(GraphView(exported)).sites if site.attention == "self"]
    options = {"grid": [4, 8, 8], "block_size": BLOCK, "sparsity": 0.5, "window": [4, 4]}
    decided = [
        Decision(site=site.id, method="test", pass_name="keep_top_blocks", options=options) for site in sites[:2]
    ]
    rewriting = apply_decisions(exported, "main", decided)
    assert rewriting.failed == {}
    rewriting.commit()
    assert operators(exported).count("index_select") == 4
    record = hoist(exported)
    assert str(record.refusals[0]) == "2 permutations remain of 12"
    assert operators(exported).count("index_select") == 2
    sparse = [node for node in exported.graph.nodes if "block_sparse_attention" in str(node.target)]
    assert [node.meta["graphwright"]["site"] for node in sparse] == [decision.site for decision in decided]


FAMILIES = {
    # One in and one out; the rotary tables of CogVideoX are handed in and permuted as well.
    "cogvideox of two layers": (2, "4 permutations remain of 8"),
    "cogvideox without rotary": (1, "2 permutations remain of 4"),
    "hunyuan": (2, "2 permutations remain of 8"),
    "ltx": (1, "2 permutations remain of 4"),
}


@pytest.mark.parametrize("model", FAMILIES)
def test_families(model: str) -> None:
    """Text is cut off and joined again on the way: it goes to where the order has it."""
    exported = copy_exported(canonical(model))
    attentions, remain = FAMILIES[model]
    assert sparsify(exported) == attentions
    record = hoist(exported)
    assert str(record.refusals[0]) == remain
    assert orders(exported) == [None] * attentions
    assert operators(exported).count("index_select") == int(remain[0])


# ---- small graphs


class Sparse(nn.Module):
    """What a function makes of tokens [1, N, 8], with sparse attention in some orders at hand as `self.attend`."""

    order: Tensor
    table: Tensor

    def __init__(self, function: Callable[..., Any], tokens: int, **stored: Tensor) -> None:
        super().__init__()
        self.function = function
        counts, blocks, self.governed = random_lists(2, tokens)
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        stored |= {"counts": counts, "blocks": blocks, "table": torch.randn(tokens, 8)}
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)

    def attend(self, query: Tensor, key: Tensor | None = None, order: str = "order") -> Tensor:
        q, k = (x.unflatten(2, (2, 4)).transpose(1, 2) for x in (query, query if key is None else key))
        y = torch.ops.graphwright.block_sparse_attention(
            q, k, k, self.counts, self.blocks, None, self.get_buffer(order), None,
            key_blocks=self.governed, block_size=BLOCK,
        )  # fmt: skip
        return y.transpose(1, 2).flatten(2)


TOKENS = 2 * BLOCK + 8


def shuffled(*runs: int, seed: int = 0) -> Tensor:
    """An order that shuffles runs of tokens among themselves, int32 [1, N]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *runs]).cumsum(0)
    return torch.cat([torch.randperm(n, generator=generator) + s for n, s in zip(runs, starts, strict=False)])[
        None
    ].int()


def small(function: Callable[..., Any], *args: Tensor, **stored: Tensor) -> ExportedProgram:
    """A function as a program of [1, N, 8] tokens, in a random order unless another is given."""
    stored = {"order": shuffled(TOKENS)} | stored
    inputs = args or (torch.randn(1, TOKENS, 8, generator=torch.Generator().manual_seed(2)),)
    exported = functional(Sparse(function, TOKENS, **stored), *inputs)
    PassManager([DropNoops()], check_numbers=False).run(exported)
    return exported


def deep(m: Sparse, x: Tensor, layers: int = 3) -> Tensor:
    for _ in range(layers):
        x = x + m.attend(m.linear(x))
    return x


REMAIN: dict[str, tuple[Callable[..., Any], str]] = {
    "permuted at the ends": (deep, "2 permutations remain of 12"),
    "left where it would be as dear": (lambda m, x: m.attend(x), "4 permutations remain of 4"),
    "left where tokens are mixed all around": (
        lambda m, x: m.attend(x.flip(1), x.roll(1, 1)).cumsum(1) + x.flip(1) * x.roll(1, 1),
        "4 permutations remain of 4",
    ),
    "a table is stored in order": (lambda m, x: deep(m, x * m.table), "2 permutations remain of 12"),
    "positions are stored in order": (
        lambda m, x: deep(m, x * (torch.arange(TOKENS) * 0.1).cos()[:, None]),
        "2 permutations remain of 12",
    ),
    "sums do not mind": (lambda m, x: deep(m, x + deep(m, x).mean(1, keepdim=True)), "2 permutations remain of 24"),
    "a returned tensor and one that goes on": (
        lambda m, x: (lambda y: (y, deep(m, y)))(deep(m, x)),
        "3 permutations remain of 24",
    ),
    "mixed in the middle": (lambda m, x: deep(m, deep(m, x).flip(1)), "4 permutations remain of 24"),
    "sizes and dtypes are no tokens": (
        lambda m, x: (lambda y: m.linear(x).type_as(y) + torch.zeros_like(y) + y)(deep(m, x)),
        "2 permutations remain of 12",
    ),
}


@pytest.mark.parametrize("name", REMAIN)
def test_the_fewest_bytes_are_moved(name: str) -> None:
    function, remain = REMAIN[name]
    record = hoist(exported := small(function))
    assert str(record.refusals[0]) == remain
    kept = [order for order in orders(exported) if order is not None]
    assert operators(exported).count("index_select") + 4 * len(kept) == int(remain.split()[0])


def test_what_is_left_says_why() -> None:
    function, _ = REMAIN["left where tokens are mixed all around"]
    record = hoist(small(function))
    assert record.changed == 0
    assert [refusal.reason for refusal in record.refusals][1:] == [
        "permuting inside the attention moves fewer bytes than permuting the tokens around it"
    ]


def test_joins_follow_an_order_that_keeps_runs_together() -> None:
    """[text, video] becomes [video, text]: the tokens of each are neighbours in the order."""

    def joint(m: Sparse, video: Tensor, text: Tensor) -> Tensor:
        for _ in range(3):
            both = torch.cat([m.linear(text), m.linear(video)], 1)
            text_out, video_out = (both + m.attend(both)).split([8, TOKENS - 8], 1)
            text, video = text + text_out, video + video_out.relu()
        return torch.cat([video.mean(1), text.mean(1)], 1)

    inputs = torch.randn(1, TOKENS - 8, 8), torch.randn(1, 8, 8)
    videos_first = torch.cat([shuffled(TOKENS - 8) + 8, torch.arange(8)[None].int()], 1)
    record = hoist(exported := small(joint, *inputs, order=videos_first))
    assert str(record.refusals[0]) == "1 permutations remain of 12", "means of tokens need no way back"
    check_text(
        exported,
        f"""
        CHECK: aten.index_select.default(%args_0, 1,
        CHECK: %[[TEXT:.*]]: float32[1, 8, 8] = aten.linear.default(%args_1
        CHECK: %[[VIDEO:.*]]: float32[1, {TOKENS - 8}, 8] = aten.linear.default(
        CHECK: aten.cat.default([%[[VIDEO]], %[[TEXT]]], 1)
        CHECK: aten.slice.Tensor(%{{{{.*}}}}, 1, {TOKENS - 8}, {TOKENS})
        CHECK: aten.slice.Tensor(%{{{{.*}}}}, 1, 0, {TOKENS - 8})
        """,
    )


def test_a_join_in_the_middle_of_a_tile_stays_in_the_models_order() -> None:
    def joint(m: Sparse, x: Tensor) -> Tensor:
        return deep(m, torch.cat([deep(m, x)[:, 8:], x[:, :8]], 1))

    assert str(hoist(small(joint)).refusals[0]) == "4 permutations remain of 24"
    # The same is no obstacle where the order leaves the two runs apart; then the first is where the second was.
    assert hoist(small(joint, order=shuffled(8, TOKENS - 8))).changed > 0


def test_each_order_is_hoisted_by_itself() -> None:
    def two(m: Sparse, x: Tensor) -> Tensor:
        x = deep(m, x)
        for _ in range(2):
            x = x + m.attend(m.linear(x), order="other")
        return x

    exported = small(two, other=shuffled(TOKENS, seed=3))
    record = hoist(exported)
    assert orders(exported) == [None] * 5
    assert str(record.refusals[0]) == f"{operators(exported).count('index_select')} permutations remain of 20"
    assert operators(exported).count("index_select") <= 4


NOT_HOISTED: dict[str, tuple[Tensor, str]] = {
    "padding": (
        torch.cat([shuffled(TOKENS), torch.full((1, 8), -1).int()], 1),
        f"its order has empty positions (positions={TOKENS + 8}, tokens={TOKENS})",
    ),
    "an order for each head": (
        torch.cat([shuffled(TOKENS), shuffled(TOKENS, seed=1)]),
        "its heads have orders of their own (orders=2)",
    ),
}


@pytest.mark.parametrize("name", NOT_HOISTED)
def test_other_orders_are_left_alone(name: str) -> None:
    order, reason = NOT_HOISTED[name]
    record = hoist(exported := small(deep, order=order))
    assert record.changed == 0
    assert [str(refusal) for refusal in record.refusals] == ["12 permutations remain of 12"] + [reason] * 3
    assert None not in orders(exported)


def test_dynamic_sizes_are_left_alone() -> None:
    def dynamic(m: Sparse, x: Tensor) -> Tensor:
        q = x.unflatten(2, (2, 4)).transpose(1, 2)
        order = torch.ops.graphwright.token_order(x, "raster", x.shape[1], 1, 1, 0, 0, False, [])
        return torch.ops.graphwright.block_sparse_attention(
            q, q, q, m.counts, m.blocks, None, order, None, key_blocks=0, block_size=BLOCK
        )

    frames = torch.export.Dim("frames", min=2 * BLOCK, max=999)
    module = Sparse(dynamic, TOKENS)
    exported = functional(module, torch.randn(1, TOKENS, 8), dynamic_shapes=(({1: frames},),))
    record = hoist(exported)
    assert record.changed == 0
    assert [refusal.reason for refusal in record.refusals][1:] == ["the number of tokens is dynamic"]
    static = functional(module, torch.randn(1, TOKENS, 8))
    assert hoist(static).refusals[1].reason == "the order of its tokens is computed when the program runs"


def test_without_sparse_attention_there_is_nothing_to_say() -> None:
    record = hoist(small(lambda m, x: m.linear(x)))
    assert (record.changed, record.refusals) == (0, ())


# ---- any graph

UNARY: dict[str, Callable[[Sparse, Tensor], Tensor]] = {
    "linear": lambda m, x: m.linear(x),
    "norm": lambda m, x: F.layer_norm(x, (8,)),
    "table": lambda m, x: x * m.table,
    "positions": lambda m, x: x * (torch.arange(TOKENS) * 0.1).sin()[:, None],
    "attend": lambda m, x: m.attend(x),
    "attend in another order": lambda m, x: m.attend(x, order="other"),
    "dense": lambda m, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "causal": lambda m, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0],
    "flip": lambda m, x: x.flip(1),
    "flip features": lambda m, x: x.flip(2),
    "softmax over tokens": lambda m, x: x.softmax(1) * 50,
    "mean of tokens": lambda m, x: x - x.mean(1, keepdim=True),
    "runs swapped": lambda m, x: torch.cat([x[:, 72:], x[:, :72]], 1),
    "a run replaced": lambda m, x: torch.slice_scatter(x, x[:, 64:] * 2, 1, 0, 72),
    "split and joined": lambda m, x: torch.cat([part.relu() for part in x.split([72, 64], 1)], 1),
    "features split": lambda m, x: torch.cat(x.chunk(2, 2)[::-1], 2),
    "features scattered": lambda m, x: torch.slice_scatter(torch.empty_like(x), x, 2),
    "transposed": lambda m, x: (x.transpose(1, 2) * 0.5).transpose(1, 2).contiguous(),
    "gathered": lambda m, x: x + x.index_select(1, m.order[0, :BLOCK]).mean(1, keepdim=True),
}
BINARY: dict[str, Callable[[Sparse, Tensor, Tensor], Tensor]] = {
    "add": lambda m, a, b: a + b,
    "multiply": lambda m, a, b: a * b,
    "attend": lambda m, a, b: m.attend(a, b),
    "cross": lambda m, a, b: F.scaled_dot_product_attention(a[:, None], b[:, None], b[:, None])[:, 0],
    "type": lambda m, a, b: a.type_as(b),
}
STEP = st.one_of(
    st.tuples(st.sampled_from(["attend", "linear", "attend", *sorted(UNARY)]), st.integers(0, 99), st.just(0)),
    st.tuples(st.sampled_from(sorted(BINARY)), st.integers(0, 99), st.integers(0, 99)),
)


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(steps=st.lists(STEP, min_size=4, max_size=14), together=st.booleans())
def test_any_graph_computes_what_it_computed(steps: list[tuple[str, int, int]], together: bool) -> None:
    def function(m: Sparse, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for name, first, second in steps:
            a, b = values[-1 - first % min(3, len(values))], values[second % len(values)]
            made = BINARY[name](m, a, b) if name in BINARY and second else UNARY.get(name, UNARY["attend"])(m, a)
            values.append(made.tanh())
        return values[-1], values[len(values) // 2]

    order = shuffled(72, 64) if together else shuffled(TOKENS)
    hoist(small(function, order=order, other=shuffled(TOKENS, seed=5)))  # the manager compares
