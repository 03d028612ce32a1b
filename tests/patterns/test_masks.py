"""Masks are what `analyse_mask` says: one table of forms with their facts, one of near misses, and random windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from graphwright.patterns.graph import GraphView, arguments, aten, is_call, shape_of
from graphwright.patterns.masks import MaskFact, analyse_mask

LOWEST = torch.finfo(torch.float32).min
MOST = 255
B, S, K, P = Dim("b", min=1, max=8), Dim("s", min=1, max=MOST), Dim("k", min=1, max=MOST), Dim("p", min=1, max=64)
ENDLESS = Dim("endless", min=1)


def column(size: int) -> Tensor:
    return torch.arange(size)[:, None]


def causal(s: int, k: int | None = None, offset: int | Tensor = 0) -> Tensor:
    return torch.arange(s if k is None else k)[None] <= column(s) + offset


def near(s: int, window: int) -> Tensor:
    return torch.arange(s)[None] > column(s) - window


def max_zero(size: Any) -> Any:
    return torch.sym_max(size, 0)


def additive(keep: Tensor, fill: float = LOWEST) -> Tensor:
    return torch.where(keep, 0.0, fill)


# ---- small modules


@dataclass(frozen=True)
class Form:
    """A way to write a mask, the inputs that it reads, and the fact expected (or a part of the reason)."""

    name: str
    make: Callable[..., Tensor]
    kind: str = "unknown"
    inputs: tuple[str, ...] = ()
    keys: str = "queries"  # or "free", "cache", "fixed", "endless"
    window: int | None = None
    per_row: bool = False
    additive: bool = False
    sees: bool = True
    reason: str = ""


class Attend(nn.Module):
    """One attention for each form, under the mask that its `make(module, q, k, **inputs)` builds."""

    def __init__(self, forms: Sequence[Form]) -> None:
        super().__init__()
        self.forms = forms
        tril = torch.ones(MOST + 1, MOST + 1, dtype=torch.bool).tril()
        self.register_buffer("tril", tril[None, None])
        self.register_buffer("local", tril & ~tril.tril(-200))
        self.register_buffer("cache", torch.randn(1, 2, 32, 4))
        self.register_buffer("blocks", torch.block_diag(*[torch.ones(3, 3)] * 3).bool())
        self.register_buffer("length", torch.zeros((), dtype=torch.int64))
        self.bias = nn.Parameter(torch.randn(2, 2 * MOST))
        self.embedding = nn.Embedding(64, 4)

    def forward(self, q: Tensor, k: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
        results = []
        for form in self.forms:
            given = {name: inputs[name] for name in form.inputs}
            keys = self.cache.expand(q.shape[0], -1, -1, -1) if form.keys == "cache" else k
            if "past" in given:
                keys = torch.cat([given.pop("past"), k], 2)
            values = keys + self.embedding(given["tokens"])[:, None] if "tokens" in given else keys
            results.append(
                nn.functional.scaled_dot_product_attention(q, keys, values, form.make(self, q, keys, **given))
            )
        self.length.add_(q.shape[2])
        return results


INPUTS: dict[str, tuple[Tensor, dict[int, Any]]] = {
    "padding": (torch.ones(2, 6, dtype=torch.int64), {0: B, 1: S}),
    "padding_bool": (torch.ones(2, 6, dtype=torch.bool), {0: B, 1: S}),
    "padding_float": (torch.ones(2, 6), {0: B, 1: S}),
    "padding_wide": (torch.ones(2, 1, 1, 6, dtype=torch.bool), {0: B, 3: S}),
    "padding_cache": (torch.ones(2, 32, dtype=torch.bool), {0: B}),
    "positions": (torch.arange(6), {0: S}),
    "position_ids": (torch.arange(6).repeat(2, 1), {0: B, 1: S}),
    "start": (torch.tensor(3), {}),
    "tokens": (torch.randint(0, 64, (2, 6)), {0: B, 1: S}),
    "segments": (torch.randint(0, 4, (2, 6)), {0: B, 1: S}),
    "given": (torch.ones(2, 1, 6, 6, dtype=torch.bool), {0: B, 2: S, 3: S}),
    "past": (torch.randn(2, 2, 5, 4), {0: B, 2: P}),
}


@cache
def analysed(keys: str) -> dict[str, MaskFact]:
    """The fact about each form with such keys; they share one export."""
    forms = [form for form in (*FORMS, *NEAR_MISSES) if form.keys == keys]
    used = {name: INPUTS[name] for form in forms for name in form.inputs}
    lengths = {"fixed": (9, 9), "free": (6, 9)}.get(keys, (6, 6))
    q, k = (torch.randn(2, 2, length, 4) for length in lengths)
    rows, columns = {"free": (S, K), "endless": (ENDLESS, ENDLESS)}.get(keys, (S, S))
    sizes: Any = {
        "q": {0: B, 2: rows},
        "k": {0: B, 2: columns},
        "inputs": {name: dynamic for name, (_, dynamic) in used.items()},
    }
    inputs = {name: value for name, (value, _) in used.items()}
    exported = torch.export.export(
        Attend(forms), (q, k, inputs), dynamic_shapes=None if keys == "fixed" else sizes, strict=False
    )
    return dict(zip([form.name for form in forms], facts(exported), strict=True))


def facts(exported: torch.export.ExportedProgram) -> list[MaskFact]:
    """The distinct facts about a program's attention masks, in the order of the layers."""
    view = GraphView(exported.run_decompositions({}))
    found: list[MaskFact] = []
    for node in view.graph.nodes:
        if is_call(node, aten.scaled_dot_product_attention.default):
            args = arguments(node)
            sizes = shape_of(args["query"])[-2], shape_of(args["key"])[-2]
            fact = analyse_mask(view, args["attn_mask"], *sizes, is_causal=args["is_causal"])
        elif is_call(node, aten.softmax.int):
            scores = node.args[0]
            while not is_call(scores, aten.add.Tensor):
                scores = scores.args[0]
            fact = analyse_mask(view, scores.args[1], *shape_of(node)[-2:])
        else:
            continue
        if not any(fact is other for other in found):  # layers that share a mask share the fact
            found.append(fact)
    return found


FORMS = (
    Form("bool ones", lambda m, q, k: q.new_ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool), "always"),
    Form("expanded true", lambda m, q, k: (column(q.shape[2]) >= 0).expand(-1, k.shape[2]), "always", keys="free"),
    Form("float zeros", lambda m, q, k: torch.zeros(q.shape[2], k.shape[2]), "always", additive=True),
    Form("padding that is all ones", lambda m, q, k, tokens: torch.ones_like(tokens).bool()[:, None, None], "always",
         ("tokens",)),
    Form("i >= j", lambda m, q, k: causal(q.shape[2]), "causal"),
    Form("[1,1,S,S]", lambda m, q, k: causal(q.shape[2])[None, None], "causal"),
    Form("[B,1,S,S]", lambda m, q, k: causal(q.shape[2]).expand(q.shape[0], 1, -1, -1), "causal"),
    Form("[B,H,S,S]", lambda m, q, k: causal(q.shape[2]).repeat(q.shape[0], 2, 1, 1), "causal"),
    Form("tril of ones", lambda m, q, k: torch.ones(q.shape[2], q.shape[2]).tril().bool(), "causal"),
    Form("not triu", lambda m, q, k: ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1), "causal"),
    Form("triu of -inf", lambda m, q, k: torch.full((q.shape[2],) * 2, -torch.inf).triu(1), "causal", additive=True),
    Form("causal, -10000", lambda m, q, k: (1.0 - causal(q.shape[2]).float()) * -1e4, "causal", additive=True),
    Form("causal, bfloat16", lambda m, q, k: ((1 - causal(q.shape[2]).bfloat16()) * -1e4).float(), "causal",
         additive=True),
    Form("slice of a buffer", lambda m, q, k: m.tril[:, :, : q.shape[2], : q.shape[2]], "causal"),
    Form("top left", lambda m, q, k: causal(q.shape[2], k.shape[2]), "causal_top_left", keys="free"),
    Form("bottom right", lambda m, q, k: causal(q.shape[2], k.shape[2], k.shape[2] - q.shape[2]),
         "causal_bottom_right", keys="free", sees=False),
    Form("after a past", lambda m, q, k: causal(q.shape[2], k.shape[2], k.shape[2] - q.shape[2]),
         "causal_bottom_right", ("past",)),
    Form("window", lambda m, q, k: causal(q.shape[2]) & near(q.shape[2], 4), "causal", window=4),
    Form("window of one", lambda m, q, k: column(q.shape[2]) == torch.arange(q.shape[2]), "causal", window=1),
    Form("window beyond small sizes", lambda m, q, k: causal(q.shape[2]) & near(q.shape[2], 128), "causal", window=128),
    Form("window in a buffer", lambda m, q, k: m.local[: q.shape[2], : q.shape[2]], "causal", window=200),
    Form("window beyond all sizes", lambda m, q, k: causal(q.shape[2]) & near(q.shape[2], 4096), "causal"),
    Form("window, additive", lambda m, q, k: additive(causal(q.shape[2]) & near(q.shape[2], 5)), "causal", window=5,
         additive=True),
    Form("padding, int", lambda m, q, k, padding: padding.bool()[:, None, None], "padding", ("padding",), sees=False),
    Form("padding, > 0", lambda m, q, k, padding: (padding > 0)[:, None, None].expand(-1, 1, q.shape[2], -1), "padding",
         ("padding",), sees=False),
    Form("padding, 4-D", lambda m, q, k, padding_wide: padding_wide, "padding", ("padding_wide",), sees=False),
    Form("padding, (1 - m) * min", lambda m, q, k, padding: ((1 - padding.float()) * LOWEST)[:, None, None], "padding",
         ("padding",), additive=True, sees=False),
    Form("padding, float", lambda m, q, k, padding_float: ((1 - padding_float) * -1e4)[:, None, None], "padding",
         ("padding_float",), additive=True, sees=False),
    Form("causal and padding", lambda m, q, k, padding_bool: causal(q.shape[2]) & padding_bool[:, None, None], "causal",
         ("padding_bool",), sees=False),
    Form("causal plus padding, additive",
         lambda m, q, k, padding: additive(causal(q.shape[2])) + additive(padding.bool(), -torch.inf)[:, None, None],
         "causal", ("padding",), additive=True, sees=False),
    Form("positions[0] + i", lambda m, q, k, positions: causal(q.shape[2], 32, positions[0]), "cache_causal",
         ("positions",), "cache"),
    Form("scalar start", lambda m, q, k, start: causal(q.shape[2], 32, start), "cache_causal", ("start",), "cache"),
    Form("start in a state", lambda m, q, k: causal(q.shape[2], 32, m.length.clone()), "cache_causal", (), "cache"),
    Form("positions[i]", lambda m, q, k, positions: torch.arange(32) <= positions[:, None], "cache_causal",
         ("positions",), "cache", per_row=True),
    Form("position_ids[b, i]", lambda m, q, k, position_ids: (torch.arange(32) <= position_ids[..., None])[:, None],
         "cache_causal", ("position_ids",), "cache", per_row=True),
    Form("rows of a buffer", lambda m, q, k, positions: m.tril[0, 0, positions, :32], "cache_causal", ("positions",),
         "cache", per_row=True),
    Form("positions[0] + i, window",
         lambda m, q, k, positions: causal(q.shape[2], 32, positions[0])
         & ~causal(q.shape[2], 32, positions[0] - 8), "cache_causal", ("positions",), "cache", window=8),
    Form("positions and padding, additive",
         lambda m, q, k, positions, padding_cache: additive(causal(q.shape[2], 32, positions[0])
                                                            & padding_cache[:, None, None]),
         "cache_causal", ("positions", "padding_cache"), "cache", additive=True, sees=False),
    Form("constant of fixed size", lambda m, q, k: m.tril[0, 0, :9, :9], "causal", keys="fixed"),
)  # fmt: skip

NEAR_MISSES = (
    Form("j < i", lambda m, q, k: causal(q.shape[2], None, -1), reason="does not see key 0"),
    Form("j <= i + 1", lambda m, q, k: causal(q.shape[2], None, 1), reason="wrong at"),
    Form("j >= i", lambda m, q, k: ~causal(q.shape[2], None, -1)),
    Form("both sides", lambda m, q, k: near(q.shape[2], 3) & near(q.shape[2], 3).T, reason="tried"),
    Form("window that grows", lambda m, q, k: causal(q.shape[2]) & near(q.shape[2], q.shape[2] // 2 + 1)),
    Form("one more pair", lambda m, q, k: causal(q.shape[2])
         | ((column(q.shape[2]) == 20) & (torch.arange(q.shape[2]) == 22)), reason="query 20 sees key 22"),
    Form("one more pair at one size", lambda m, q, k: causal(q.shape[2], None, torch.full((), q.shape[2]) == 60),
         reason="s0=60"),
    Form("causal at odd sizes", lambda m, q, k: causal(q.shape[2], None, 1 - q.shape[2] % 2), reason="sees key 1"),
    Form("never fewer than all", lambda m, q, k: causal(q.shape[2], k.shape[2], max_zero(k.shape[2] - q.shape[2])),
         keys="free"),
    Form("blocks", lambda m, q, k: column(q.shape[2]) // 4 == torch.arange(q.shape[2]) // 4),
    Form("causal blocks", lambda m, q, k: column(q.shape[2]) // 4 >= torch.arange(q.shape[2]) // 4),
    Form("near blocks", lambda m, q, k: causal(q.shape[2])
         & (column(q.shape[2]) // 16 - torch.arange(q.shape[2]) // 16 < 12)),
    Form("constant blocks", lambda m, q, k: m.blocks, keys="fixed"),
    Form("alibi", lambda m, q, k: additive(causal(q.shape[2])) + (torch.arange(q.shape[2]) - column(q.shape[2])) * 0.5,
         reason="adds a bias"),
    Form("relative bias", lambda m, q, k: m.bias[:, column(q.shape[2]) - torch.arange(q.shape[2]) + MOST],
         reason="adds a bias"),
    Form("weak padding", lambda m, q, k, padding: ((1 - padding.float()) * -100)[:, None, None], inputs=("padding",),
         reason="adds a bias"),
    Form("padding inverted", lambda m, q, k, padding: (padding == 0)[:, None, None], inputs=("padding",)),
    Form("padding of queries", lambda m, q, k, padding: padding.bool()[:, None, :, None], inputs=("padding",)),
    Form("padding of tokens", lambda m, q, k, tokens: (tokens != 0)[:, None, None], inputs=("tokens",)),
    Form("causal but for one token", lambda m, q, k, segments: causal(q.shape[2]) | (segments == 57)[:, None, None],
         inputs=("segments",)),
    Form("packed sequences", lambda m, q, k, segments: causal(q.shape[2])
         & (segments[:, None, :, None] == segments[:, None, None]), inputs=("segments",)),
    Form("j < positions[i]", lambda m, q, k, positions: torch.arange(32) < positions[:, None], inputs=("positions",),
         keys="cache"),
    Form("positions where consecutive", lambda m, q, k, positions: causal(q.shape[2], 32, positions[0])
         & (positions.diff(prepend=positions[:1] - 1) == 1)[:, None], inputs=("positions",), keys="cache"),
    Form("random", lambda m, q, k: torch.rand(q.shape[2], q.shape[2]) >= 0, reason="random or undefined value, rand"),
    Form("mask as input", lambda m, q, k, given: given, inputs=("given",),
         reason="depends on the value of inputs_given: bool"),
    Form("depends on the query", lambda m, q, k: q.sum(-1, keepdim=True) > -1e9, reason="depends on the value of q"),
    Form("unaffordable window", lambda m, q, k: causal(q.shape[2]) & near(q.shape[2], 70000), keys="endless",
         reason="needs an evaluation at"),
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms(form: Form):
    fact = analysed(form.keys)[form.name]
    found = (fact.kind, fact.window, fact.per_row, fact.additive, fact.every_row_sees_a_key)
    assert found == (form.kind, form.window, form.per_row, form.additive, form.sees), fact.reason
    read = {node.name.removeprefix("inputs_") for node in (fact.positions, fact.padding) if node is not None}
    assert read - {"b_length"} == {name for name in form.inputs if name not in ("past", "tokens")}
    assert (fact.positions is not None) == (form.kind == "cache_causal")


@pytest.mark.parametrize("form", NEAR_MISSES, ids=lambda form: form.name)
def test_near_misses(form: Form):
    fact = analysed(form.keys)[form.name]
    assert fact.kind == "unknown", fact.reason
    assert fact.positions is None
    assert fact.padding is None
    assert form.reason in fact.reason
    assert not fact.every_row_sees_a_key


def test_without_a_mask():
    def facts_of(*, is_causal: bool, free: bool) -> MaskFact:
        class Plain(nn.Module):
            def forward(self, q: Tensor, k: Tensor) -> Tensor:
                return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=is_causal)

        q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9 if free else 6, 4)
        sizes = {"q": {2: S}, "k": {2: K if free else S}}
        return facts(torch.export.export(Plain(), (q, k), dynamic_shapes=sizes, strict=False))[0]

    assert facts_of(is_causal=False, free=True).kind == "none"
    assert facts_of(is_causal=True, free=False).kind == "causal"
    assert facts_of(is_causal=True, free=True).kind == "causal_top_left"


@settings(max_examples=5, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(-2, 2)), min_size=8, max_size=8, unique=True),
    most=st.integers(8, 60),
)
def test_random_windows(shapes: list[tuple[int, int]], most: int):
    class Windowed(nn.Module):
        def forward(self, q: Tensor) -> list[Tensor]:
            masks = [causal(q.shape[2], None, offset) & near(q.shape[2], window) for window, offset in shapes]
            return [nn.functional.scaled_dot_product_attention(q, q, q, mask) for mask in masks]

    sizes = {"q": {2: Dim("s", min=1, max=most)}}
    exported = torch.export.export(Windowed(), (torch.randn(1, 1, 6, 4),), dynamic_shapes=sizes, strict=False)
    for fact, (window, offset) in zip(facts(exported), shapes, strict=True):
        if offset == 0:
            assert (fact.kind, fact.window) == ("causal", window if window < most else None)
        else:
            assert fact.kind == "unknown"


# ---- models of transformers


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


class Model(nn.Module):
    """A model with its inputs by name and its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, input_ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        decodes = hasattr(self.model, "lm_head")
        return self.model(input_ids=input_ids, **inputs, **({"use_cache": False} if decodes else {}))[0]


class StaticModel(nn.Module):
    """A decoder over key and value buffers of fixed length, which it writes from `positions[0]` on."""

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model, self.length = model.eval(), length
        for layer in range(model.config.num_hidden_layers):
            self.register_buffer(f"keys{layer}", torch.zeros(1, 2, length, 16))
            self.register_buffer(f"values{layer}", torch.zeros(1, 2, length, 16))

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        from transformers.cache_utils import StaticCache, StaticLayer

        cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        cache.layers = [StaticLayer(self.length) for _ in cache.layers]
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values = getattr(self, f"keys{index}"), getattr(self, f"values{index}")
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.batch_size, layer.num_heads, layer.k_head_dim, layer.v_head_dim = 1, 2, 16, 16
            layer.cumulative_length, layer.is_initialized = positions[0].clone(), True
        return self.model(input_ids=input_ids, position_ids=positions[None], past_key_values=cache).logits


IDS = torch.arange(24).reshape(2, 12)


def export(module: nn.Module, **inputs: Tensor) -> list[MaskFact]:
    sizes = {0: B, 1: S}
    dynamic = {"input_ids": sizes, "inputs": dict.fromkeys(inputs, sizes)}
    return facts(torch.export.export(module, (IDS, inputs), dynamic_shapes=dynamic, strict=False))


def build(name: str, head: str = "ForCausalLM", **options: Any) -> nn.Module:
    """A transformers model with random weights; the options are its config's."""
    import transformers

    torch.manual_seed(0)
    settled = getattr(transformers, f"{name}Config")(**(SMALL | options))
    return getattr(transformers, f"{name.removesuffix('Text')}{head}")(settled)


GROUPED = {"num_key_value_heads": 2}
GEMMA = GROUPED | {
    "head_dim": 16,
    "sliding_window": 8,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 256}


@pytest.mark.parametrize(
    ("name", "options", "padded", "expected"),
    [
        ("Llama", GROUPED, False, [("causal", None)]),
        ("Llama", GROUPED | {"attn_implementation": "eager"}, True, [("causal", None)]),
        ("Mistral", GROUPED | {"sliding_window": 100}, False, [("causal", 100)]),
        ("Gemma2", GEMMA, False, [("causal", 8), ("causal", None)]),
        ("Gemma3Text", GEMMA, True, [("causal", 8), ("causal", None)]),
        ("GPT2", GPT2, False, [("causal", None)]),
    ],
)
def test_decoders(name: str, options: dict[str, Any], padded: bool, expected: list[tuple[str, int | None]]):
    model = Model(build(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM", **options))
    inputs = {"attention_mask": torch.ones_like(IDS)} if padded else {}
    found = export(model, **inputs)
    assert [(fact.kind, fact.window) for fact in found] == expected, [fact.reason for fact in found]
    for fact in found:
        assert (fact.padding is not None) == padded
        assert fact.positions is None
        assert fact.every_row_sees_a_key == (not padded)
        assert fact.additive == (options.get("attn_implementation") == "eager" or name == "Gemma2")


def test_packed_positions_are_not_causal():
    (fact,) = export(Model(build("Llama", **GROUPED)), position_ids=torch.arange(12).repeat(2, 1))
    assert fact.kind == "unknown"
    assert "position_ids" in fact.reason


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder_with_padding(attention: str):
    model = Model(build("Bert", "Model", attn_implementation=attention))
    (fact,) = export(model, attention_mask=torch.ones_like(IDS))
    assert (fact.kind, fact.window, fact.additive) == ("padding", None, attention == "eager"), fact.reason
    assert fact.padding is not None


def test_vision_encoder():
    model = build("ViT", "Model", image_size=16, patch_size=4).eval()
    (fact,) = facts(torch.export.export(model, (torch.randn(2, 3, 16, 16),), strict=False))
    assert (fact.kind, fact.every_row_sees_a_key) == ("always", True)


@pytest.mark.parametrize(("name", "window"), [("Llama", None), ("Mistral", 8)])
def test_static_cache(name: str, window: int | None):
    options = GROUPED | ({"sliding_window": window} if window else {})
    module = StaticModel(build(name, **options), 32)
    sizes = {"input_ids": {1: S}, "positions": {0: S}}
    exported = torch.export.export(module, (IDS[:1], torch.arange(12)), dynamic_shapes=sizes, strict=False)
    (fact,) = facts(exported)
    assert (fact.kind, fact.window, fact.per_row) == ("cache_causal", window, False), fact.reason
    assert fact.positions is not None
    assert fact.positions.name == "positions"
    assert fact.every_row_sees_a_key
