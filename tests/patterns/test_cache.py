"""Caches of real decoders and of small modules in every form of writing; near misses with their reasons."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from graphwright.passes.canonicalize import canonicalize
from graphwright.patterns.cache import CacheSite, find_caches
from graphwright.patterns.graph import GraphView
from graphwright.patterns.linear import find_linears
from graphwright.patterns.nodes import shape_of
from graphwright.patterns.site import Found

LENGTH, LAYERS, KV_HEADS, SIZE = 32, 2, 2, 16


def functional(model: nn.Module, *args, dynamic_shapes=None) -> ExportedProgram:
    with torch.no_grad():
        program = export(model.eval(), args, dynamic_shapes=dynamic_shapes, strict=False)
        return program.run_decompositions({})


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        vocab_size=100,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


class StaticLlama(nn.Module):
    """transformers' static cache, bound to this module's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()
        for index in range(LAYERS):
            self.register_buffer(f"k{index}", torch.zeros(1, KV_HEADS, LENGTH, SIZE))
            self.register_buffer(f"v{index}", torch.zeros(1, KV_HEADS, LENGTH, SIZE))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        past = transformers.StaticCache(config=self.model.config, max_cache_len=LENGTH)
        for index, layer in enumerate(past.layers):
            layer.keys, layer.values = self.get_buffer(f"k{index}"), self.get_buffer(f"v{index}")
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.batch_size, layer.num_heads = 1, KV_HEADS
            layer.k_head_dim = layer.v_head_dim = SIZE
            layer.cumulative_length, layer.is_initialized = positions[0].clone(), True
        return self.model(ids, position_ids=positions[None], past_key_values=past, use_cache=True).logits


class GrowingLlama(nn.Module):
    """transformers' dynamic cache, handed in and returned as plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        kept = transformers.DynamicCache()
        for index, (key, value) in enumerate(past):
            kept.update(key, value, index)
        output = self.model(ids, past_key_values=kept, use_cache=True)
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


@cache
def static_llama() -> ExportedProgram:
    tokens = Dim("tokens", min=2, max=LENGTH)
    inputs = torch.arange(8)[None], torch.arange(8)
    return functional(StaticLlama(), *inputs, dynamic_shapes=({1: tokens}, {0: tokens}))


@pytest.mark.parametrize("canonical", [False, True], ids=["exported", "canonical"])
def test_static_cache_of_llama(canonical: bool) -> None:
    program = copy.deepcopy(static_llama())
    if canonical:
        canonicalize(program)
    view = GraphView(program)
    found = find_caches(view, phase="decode")
    assert not found.refusals
    assert [(site.key_name, site.value_name) for site in found.sites] == [("k0", "v0"), ("k1", "v1")]
    roles = {site.node: site.role for site in find_linears(view).sites}
    for index, site in enumerate(found.sites):
        assert site.id == f"decode/model.model.layers.{index}.self_attn/cache[0]"
        assert (site.layout, site.reads, site.length, site.write_dim) == ("static", "cache", LENGTH, 2)
        assert (site.kv_heads, site.head_dim, site.value_head_dim) == (KV_HEADS, SIZE, SIZE)
        assert view.target(site.key_buffer) == site.key_name
        assert view.target(site.value_buffer) == site.value_name
        assert view.mutated[site.key_write.name] == site.key_name
        assert site.attention.target is torch.ops.aten.scaled_dot_product_attention.default
        assert isinstance(site.positions, torch.fx.Node)
        assert shape_of(site.positions) == shape_of(site.new_key)[2:3]
        assert shape_of(site.new_key)[1] == shape_of(site.new_value)[1] == KV_HEADS
        assert roles[_linear_behind(site.new_value)] == "v"
        assert site.describe()["length"] == str(LENGTH)


def _linear_behind(node: torch.fx.Node) -> torch.fx.Node:
    while node.target is not torch.ops.aten.linear.default:
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def test_growing_cache_of_llama() -> None:
    past = [(torch.randn(1, KV_HEADS, 5, SIZE), torch.randn(1, KV_HEADS, 5, SIZE)) for _ in range(LAYERS)]
    found = find_caches(GraphView(functional(GrowingLlama(), torch.zeros(1, 1, dtype=torch.int64), past)))
    assert not found.refusals
    assert [site.id for site in found.sites] == [
        f"main/model.model.layers.{index}.self_attn/cache[0]" for index in range(LAYERS)
    ]
    for index, site in enumerate(found.sites):
        assert (site.layout, site.length, site.positions, site.reads) == ("growing", None, None, "cache")
        assert (site.key_name, site.value_name) == (f"past_{index}_0", f"past_{index}_1")
        assert shape_of(site.new_key) == (1, KV_HEADS, 1, SIZE)
        assert site.describe()["length"] == "grows"


class Small(nn.Module):
    """One attention of two heads over caches `key` and `value` of eight tokens; what varies is handed in."""

    def __init__(self, step: Callable[..., Tensor], shape: tuple[int, ...] = (1, 2, 8, 4)) -> None:
        super().__init__()
        self.register_buffer("key", torch.zeros(shape))
        self.register_buffer("value", torch.zeros(shape))
        self.step = step

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        return self.step(self.key, self.value, q, k, v, at)


def found_in(step: Callable[..., Tensor], shape: tuple[int, ...] = (1, 2, 8, 4)) -> Found[CacheSite]:
    q, k, v = torch.randn(3, 1, 2, 3, 4)
    return find_caches(GraphView(functional(Small(step, shape), q, k, v, torch.arange(3))))


attend = F.scaled_dot_product_attention


def by_index_copy(key, value, q, k, v, at):
    key.index_copy_(2, at, k)
    value.index_copy_(-2, at, v)
    return attend(q, key, value)


def by_index_put(key, value, q, k, v, at):
    key[:, :, at] = k
    value[:, :, at] = v
    return attend(q, key, value)


def by_slice(key, value, q, k, v, at):
    key[:, :, 2:5] = k
    value[:, :, 2:5] = v
    return attend(q, key, value)


def in_another_type(key, value, q, k, v, at):
    key.index_copy_(2, at, k)
    value.index_copy_(2, at, v)
    return attend(q.double(), key.double(), value.double())


def into_recomputed_positions(key, value, q, k, v, at):
    key.index_copy_(2, at + 1, k)
    value.index_copy_(2, at + 1, v)
    return attend(q, key, value)


FORMS = {
    "index_copy": by_index_copy,
    "index_put": by_index_put,
    "slice": by_slice,
    "cast": in_another_type,
    "positions": into_recomputed_positions,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_writing(form: str) -> None:
    found = found_in(FORMS[form])
    assert not found.refusals
    (site,) = found.sites
    assert (site.key_name, site.value_name, site.length, site.kv_heads) == ("key", "value", 8, 2)
    assert (site.new_key.name, site.new_value.name) == ("k", "v")
    assert site.positions == 2 if form == "slice" else isinstance(site.positions, torch.fx.Node)
    assert site.id == "main/cache[0]"


def test_a_prefill_reads_what_is_new() -> None:
    def step(key, value, q, k, v, at):
        key.index_copy_(2, at, k)
        value.index_copy_(2, at, v)
        return attend(q, k, v, is_causal=True)

    (site,) = found_in(step).sites
    assert (site.reads, site.length) == ("new", 8)
    assert site.describe()["reads"] == "new tokens"


def read_elsewhere(key, value, q, k, v, at):
    return by_index_copy(key, value, q, k, v, at) + key.sum()


def read_before(key, value, q, k, v, at):
    old = key.mean()
    return by_index_copy(key, value, q, k, v, at) * old


def written_twice(key, value, q, k, v, at):
    key.index_copy_(2, at, k)
    key.index_copy_(2, at + 3, k)
    value.index_copy_(2, at, v)
    return attend(q, key, value)


def key_alone(key, value, q, k, v, at):
    key.index_copy_(2, at, k)
    return attend(q, key, torch.cat([v, v, v], 2)[:, :, :8])


def at_different_positions(key, value, q, k, v, at):
    key.index_copy_(2, at, k)
    value.index_copy_(2, at + 1, v)
    return attend(q, key, value)


def two_indices(key, value, q, k, v, at):
    key[:, torch.arange(2)[:, None], at[None]] = k
    value.index_copy_(2, at, v)
    return attend(q, key, value)


def accumulated(key, value, q, k, v, at):
    torch.ops.aten.index_put_(key, [None, None, at], k, True)
    value.index_copy_(2, at, v)
    return attend(q, key, value)


def every_other(key, value, q, k, v, at):
    key[:, :, 1:7:2] = k
    value[:, :, 1:7:2] = v
    return attend(q, key, value)


def rolled(key, value, q, k, v, at):
    key.copy_(torch.cat([key[:, :, 3:], k], 2))
    value.index_copy_(2, at, v)
    return attend(q, key, value)


def over_heads(key, value, q, k, v, at):
    key.index_copy_(1, at[:2], torch.cat([k, k, k], 2)[:, :, :8])
    value.index_copy_(2, at, v)
    return attend(q, key, value)


def shared_by_two(key, value, q, k, v, at):
    return by_index_copy(key, value, q, k, v, at) + attend(q + 1, key, value)


def unread(key, value, q, k, v, at):
    key.index_copy_(2, at, k)
    value.index_copy_(2, at, v)
    return attend(q, k + 1, v + 1)


def tokens_reversed_on_read(key, value, q, k, v, at):
    key.index_copy_(2, at, k)
    value.index_copy_(2, at, v)
    return attend(q, key.reshape(1, 8, 2, 4).transpose(1, 2), value)


def crossed_heads(key, value, q, k, v, at):
    """Repeats the heads in the order 0 1 0 1, where query heads of one group need 0 0 1 1."""
    key.index_copy_(2, at, k)
    value.index_copy_(2, at, v)
    repeated = key[:, None].expand(1, 2, 2, 8, 4).reshape(1, 4, 8, 4)
    return attend(torch.cat([q, q], 1), repeated, value[:, :, None].expand(1, 2, 2, 8, 4).reshape(1, 4, 8, 4))


NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "read_elsewhere": (read_elsewhere, "buffer is read by something that is not its attention"),
    "read_before": (read_before, "buffer is read before it is written"),
    "written_twice": (written_twice, "buffer is written twice"),
    "key_alone": (key_alone, "key is cached but value is not"),
    "positions": (at_different_positions, "key and value are written at different positions"),
    "two_indices": (two_indices, "index is not provable"),
    "accumulated": (accumulated, "index is not provable"),
    "every_other": (every_other, "index is not provable"),
    "rolled": (rolled, "buffer is not written by token positions"),
    "over_heads": (over_heads, "tokens are not dimension 2"),
    "shared_by_two": (shared_by_two, "buffer is read more than once"),
    "unread": (unread, "no attention reads the buffer"),
    "layout": (tokens_reversed_on_read, "attention reads the cache in another layout"),
    "crossed_heads": (crossed_heads, "attention reads the cache in another layout"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_with_the_reason(name: str) -> None:
    step, reason = NEAR_MISSES[name]
    found = found_in(step)
    assert not found.sites
    assert found.refusals[0].reason == reason
    assert {refusal.reason for refusal in found.refusals} <= {reason, "value is cached but key is not"}


def test_the_reader_is_named() -> None:
    refusal = next(r for r in found_in(read_elsewhere).refusals if "read by something" in r.reason)
    assert refusal.facts["operator"] == "aten.sum.default"
    assert refusal.facts["buffer"] == "key"


def test_a_counter_is_no_near_miss_of_a_cache() -> None:
    class Counter(Small):
        def __init__(self) -> None:
            super().__init__(by_index_copy)
            self.register_buffer("seen", torch.tensor(0))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
            self.seen.add_(at.shape[0])
            return super().forward(q, k, v, at)

    q, k, v = torch.randn(3, 1, 2, 3, 4)
    found = find_caches(GraphView(functional(Counter(), q, k, v, torch.arange(3))))
    assert len(found.sites) == 1
    assert [(r.reason, r.depth) for r in found.refusals] == [("buffer is not [batch, heads, length, head_dim]", 0)]


def test_an_input_changed_in_place_is_no_state() -> None:
    class InPlace(nn.Module):
        def forward(self, key: Tensor, value: Tensor, q: Tensor, at: Tensor) -> Tensor:
            return by_index_copy(key, value, q, q, q, at)

    q, store = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 8, 4)
    found = find_caches(GraphView(functional(InPlace(), store, store.clone(), q, torch.arange(3))))
    assert not found.sites
    assert found.nearest_miss is not None
    assert found.nearest_miss.reason == "buffer is an input of the call that is changed in place, not state"


def test_a_growing_key_needs_a_growing_value() -> None:
    class KeyAlone(nn.Module):
        def forward(self, past: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            key = torch.cat([past, k], -2)
            return attend(q, key, v), key

    q = torch.randn(1, 2, 3, 4)
    program = functional(KeyAlone(), torch.randn(1, 2, 5, 4), q, q, torch.randn(1, 2, 8, 4))
    (refusal,) = find_caches(GraphView(program)).refusals
    assert refusal.reason == "key is cached but value is not"
    assert refusal.facts["buffer"] == "past"
