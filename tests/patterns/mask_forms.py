"""One table of the ways to write a mask, with the fact about each, and one of near misses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from graphwright.patterns.graph import GraphView
from graphwright.patterns.masks import MaskFact, analyse_mask
from graphwright.patterns.nodes import arguments, aten, is_call, shape_of

LOWEST = torch.finfo(torch.float32).min
MOST = 255
SLOPES = (0.25, 0.0078125)
B, S, K, P = Dim("b", min=1, max=8), Dim("s", min=1, max=MOST), Dim("k", min=1, max=MOST), Dim("p", min=1, max=64)
ENDLESS = Dim("endless", min=1, max=1 << 20)


def column(size: int) -> Tensor:
    return torch.arange(size)[:, None]


def causal(s: int, k: int | None = None, offset: int | Tensor = 0) -> Tensor:
    return torch.arange(s if k is None else k)[None] <= column(s) + offset


def near(s: int, window: int) -> Tensor:
    return torch.arange(s)[None] > column(s) - window


def away(s: int) -> Tensor:
    """Distance of key from query, negative before it."""
    return torch.arange(s) - column(s)


def line(m: Any, k: int) -> Tensor:
    """ALiBi's bias, [heads, 1, keys]."""
    return m.slopes[:, None, None] * torch.arange(k)


def max_zero(size: Any) -> Any:
    return torch.sym_max(size, 0)


def additive(keep: Tensor, fill: float = LOWEST) -> Tensor:
    return torch.where(keep, 0.0, fill)


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
    slopes: tuple[float, ...] = ()
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
        self.register_buffer("slopes", torch.tensor(SLOPES))
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
    "starts": (torch.tensor([0, 3]), {0: B}),
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
    Form("positions and starts",
         lambda m, q, k, positions, starts: causal(q.shape[2], 32, positions[0])
         & (torch.arange(32) >= starts[:, None, None, None]), "cache_causal", ("positions", "starts"), "cache",
         sees=False),
    Form("rows of a mask of starts, window",
         lambda m, q, k, positions, starts: (torch.arange(32) >= starts[:, None])[:, None, None]
         & causal(q.shape[2], 32, positions[0]) & ~causal(q.shape[2], 32, positions[0] - 8),
         "cache_causal", ("positions", "starts"), "cache", window=8, sees=False),
    Form("starts alone", lambda m, q, k, starts: (torch.arange(k.shape[2]) > starts[:, None] - 1)[:, None, None],
         "padding", ("starts",), sees=False),
    Form("alibi, by distance", lambda m, q, k: additive(causal(q.shape[2])) + away(q.shape[2]) * 0.5, "alibi",
         additive=True, slopes=(0.5,)),
    Form("alibi, by key", lambda m, q, k: line(m, k.shape[2]) + torch.full((q.shape[2],) * 2, -torch.inf).triu(1),
         "alibi", additive=True, slopes=SLOPES),
    Form("alibi, filled", lambda m, q, k: line(m, k.shape[2]).masked_fill(~causal(q.shape[2]), -1e9), "alibi",
         additive=True, slopes=SLOPES),
    Form("alibi, each row shifted", lambda m, q, k: additive(causal(q.shape[2])) + line(m, k.shape[2])
         + (column(q.shape[2]) % 7).float(), "alibi", additive=True, slopes=SLOPES),
    Form("alibi, window", lambda m, q, k: additive(causal(q.shape[2]) & near(q.shape[2], 5)) + line(m, k.shape[2]),
         "alibi", window=5, additive=True, slopes=SLOPES),
    Form("alibi in a cache", lambda m, q, k, positions: additive(causal(q.shape[2], 32, positions[0])) + line(m, 32),
         "cache_alibi", ("positions",), "cache", additive=True, slopes=SLOPES),
    Form("alibi in a cache, by distance",
         lambda m, q, k, positions: additive(torch.arange(32) <= positions[:, None])
         + m.slopes[:, None, None] * (torch.arange(32) - positions[:, None]),
         "cache_alibi", ("positions",), "cache", per_row=True, additive=True, slopes=SLOPES),
    Form("alibi in a cache, from starts",
         lambda m, q, k, positions, starts: additive(causal(q.shape[2], 32, positions[0])
                                                     & (torch.arange(32) >= starts[:, None, None, None]))
         + m.slopes[:, None, None] * (torch.arange(32) - starts[:, None, None, None]),
         "cache_alibi", ("positions", "starts"), "cache", additive=True, sees=False, slopes=SLOPES),
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
    Form("causal blocks of 64", lambda m, q, k: causal(q.shape[2], k.shape[2])
         & (column(q.shape[2]) // 64 == torch.arange(k.shape[2]) // 64), keys="free"),
    Form("causal up to a query", lambda m, q, k: causal(q.shape[2], k.shape[2]) & (column(q.shape[2]) < 240),
         keys="free"),
    Form("near or first keys", lambda m, q, k: ~causal(q.shape[2], k.shape[2], -33) | (torch.arange(k.shape[2]) < 64),
         keys="free"),
    Form("constant blocks", lambda m, q, k: m.blocks, keys="fixed"),
    Form("alibi on both sides", lambda m, q, k: away(q.shape[2]).abs() * -0.5,
         reason="is no line over the keys"),
    Form("alibi without causality", lambda m, q, k: line(m, k.shape[2]), reason="is not causal but keeps `every key`"),
    Form("alibi that ends", lambda m, q, k: additive(causal(q.shape[2])) + away(q.shape[2]).clamp(min=-200) * 0.5,
         reason="is no line over the keys"),
    Form("alibi, squared", lambda m, q, k: additive(causal(q.shape[2])) - away(q.shape[2]) ** 2 / 64,
         reason="is no line over the keys"),
    Form("alibi of rows", lambda m, q, k: additive(causal(q.shape[2])) + away(q.shape[2]) * column(q.shape[2]) / 8,
         reason="is no line over the keys"),
    Form("alibi by size", lambda m, q, k: additive(causal(q.shape[2])) + line(m, k.shape[2]) / q.shape[2],
         reason="elsewhere by"),
    Form("alibi of the first keys", lambda m, q, k: additive(causal(q.shape[2]))
         + torch.where(torch.arange(k.shape[2]) < 150, line(m, k.shape[2]), 0.0), reason="adds a bias"),
    Form("alibi, bfloat16", lambda m, q, k: (additive(causal(q.shape[2])) + away(q.shape[2]) * 0.3).bfloat16().float(),
         reason="is no line over the keys"),
    Form("alibi, one pair less", lambda m, q, k: additive(causal(q.shape[2]) & ~((column(q.shape[2]) == 20)
         & (torch.arange(q.shape[2]) == 10))) + line(m, k.shape[2]), reason="query 20 does not see key 10"),
    Form("nan", lambda m, q, k: torch.full((q.shape[2],) * 2, torch.nan), reason="adds a bias, for example nan"),
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
    Form("j > starts", lambda m, q, k, positions, starts: causal(q.shape[2], 32, positions[0])
         & (torch.arange(32) > starts[:, None, None, None]), inputs=("positions", "starts"), keys="cache"),
    Form("starts of a neighbour", lambda m, q, k, positions, starts: causal(q.shape[2], 32, positions[0])
         & (torch.arange(32) >= starts.flip(0)[:, None, None, None]), inputs=("positions", "starts"), keys="cache"),
    Form("ends", lambda m, q, k, starts: (torch.arange(k.shape[2]) < starts[:, None])[:, None, None],
         inputs=("starts",)),
    Form("positions where consecutive", lambda m, q, k, positions: causal(q.shape[2], 32, positions[0])
         & (positions.diff(prepend=positions[:1] - 1) == 1)[:, None], inputs=("positions",), keys="cache"),
    Form("random", lambda m, q, k: torch.rand(q.shape[2], q.shape[2]) >= 0, reason="random or undefined value, rand"),
    Form("mask as input", lambda m, q, k, given: given, inputs=("given",),
         reason="depends on the value of inputs_given: bool"),
    Form("depends on the query", lambda m, q, k: q.sum(-1, keepdim=True) > -1e9, reason="depends on the value of q"),
    Form("unaffordable window", lambda m, q, k: causal(q.shape[2]) & near(q.shape[2], 70000), keys="endless",
         reason="needs an evaluation at"),
)  # fmt: skip
