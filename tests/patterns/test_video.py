"""Where the video stands in a sequence, for five families of video transformers and for near misses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.patterns.attention import AttentionSite, find_attention
from graphwright.patterns.graph import GraphView, Refusal
from graphwright.patterns.nodes import shape_of
from graphwright.patterns.video import VideoLayout, video_layout
from tests.graph_text import functional
from tests.video_models import GRID, canonical

VIDEO = math.prod(GRID)


@cache
def layouts(model: str, dynamic: bool = False) -> dict[str, VideoLayout | Refusal]:
    """Module path -> what is said of its attention; a second attention of a module has `[1]` behind."""
    view = GraphView(canonical(model, dynamic))
    sites = find_attention(view).sites
    return {site.place.removeprefix("model.").replace("/attention[0]", ""): video_layout(view, site) for site in sites}


BLOCK = "transformer_blocks.0"
EXPECTED = {
    ("wan", "blocks.0.attn1"): ("none", 0, False),
    ("cogvideox", f"{BLOCK}.attn1"): ("7 first", 7, False),
    ("cogvideox of two layers", "transformer_blocks.1.attn1"): ("7 first", 7, False),
    ("cogvideox without rotary", f"{BLOCK}.attn1"): ("7 first", 7, False),
    ("hunyuan", f"{BLOCK}.attn"): ("7 last", 0, True),
    ("hunyuan", f"single_{BLOCK}.attn"): ("7 last", 0, True),
    ("ltx", f"{BLOCK}.attn1"): ("none", 0, False),
    ("mochi", f"{BLOCK}.attn1"): ("u0 last", 0, False),
    ("mochi", "transformer_blocks.1.attn1"): ("u1 last", 0, False),
    ("mochi of two", f"{BLOCK}.attn1/attention[1]"): ("u1 last", 0, False),
}
"""(model, module) -> text, first video token, whether keys are masked."""

REFUSED = {
    ("wan", "blocks.0.attn2"): "queries and keys differ in number (queries=72, keys=7)",
    ("hunyuan", "context_embedder.token_refiner.refiner_blocks.0.attn"): "the mask is not the same for all queries",
    ("ltx", f"{BLOCK}.attn2"): "queries and keys differ in number (queries=72, keys=7)",
    ("mochi", "time_embed.pooler"): "queries and keys differ in number (queries=1, keys=8)",
}


@pytest.mark.parametrize(("model", "module"), EXPECTED)
def test_the_layout_is_proved(model: str, module: str) -> None:
    layout = layouts(model)[module]
    assert isinstance(layout, VideoLayout), layout
    text, first, masked = EXPECTED[model, module]
    assert (layout.frames, layout.height, layout.width) == GRID
    assert (layout.tokens, layout.first) == (VIDEO, first)
    assert layout.describe()["text"] == text
    assert layout.describe()["grid"] == "3 x 4 x 6"
    assert (layout.key_mask is not None) == masked
    if layout.key_mask is not None:
        assert shape_of(layout.key_mask) == (1, 1, 1, VIDEO + 7)


@pytest.mark.parametrize(("model", "module"), REFUSED)
def test_other_attentions_of_the_models_are_refused(model: str, module: str) -> None:
    assert str(layouts(model)[module]).startswith(REFUSED[model, module])


@pytest.mark.parametrize(
    ("model", "module", "symbol"),
    [
        ("wan", "blocks.0.attn1", "s71"),
        ("cogvideox of two layers", "transformer_blocks.1.attn1", "s41"),
        ("hunyuan", f"single_{BLOCK}.attn", "s71"),
        ("mochi", "transformer_blocks.1.attn1", "s71"),
    ],
)
def test_frames_may_be_dynamic(model: str, module: str, symbol: str) -> None:
    static, layout = layouts(model)[module], layouts(model, dynamic=True)[module]
    assert isinstance(static, VideoLayout)
    assert isinstance(layout, VideoLayout), layout
    assert str(layout.frames) == symbol
    assert str(layout.tokens) == f"24*{symbol}"
    assert (layout.height, layout.width, layout.first) == (*GRID[1:], static.first)
    assert layout.describe()["text"] == static.describe()["text"]
    assert (layout.key_mask is None) == (static.key_mask is None)


def attend(query: Tensor, key: Tensor | None = None, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Attention of tokens [B, N, 8] with two heads."""
    q, k = (x.unflatten(2, (2, 4)).transpose(1, 2) for x in (query, query if key is None else key))
    return nn.functional.scaled_dot_product_attention(q, k, k, mask, **options)


class Toy(nn.Module):
    """Patches of a video, text that is handed in, and what attends to them, many in one program."""

    def __init__(self, attentions: list[Any], order: str) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, 8, (1, 2, 2), (1, 2, 2))
        self.to_q = nn.Linear(8, 8)
        self.attentions = attentions
        self.order = ["bcthw".index(axis) for axis in order]

    def forward(self, video: Tensor, text: Tensor) -> list[Tensor]:
        tokens = self.to_q(self.embed(video).permute(self.order).flatten(2).transpose(1, 2)), self.to_q(text)
        return [attention(*tokens) for attention in self.attentions]


@cache
def toys(text: int, order: str) -> dict[str, tuple[GraphView, AttentionSite]]:
    """The attention of each case with so much text and such an order of axes."""
    cases = {name: case for name, case in CASES.items() if (case.text, case.order) == (text, order)}
    model = Toy([case.attention for case in cases.values()], order)
    view = GraphView(functional(model, torch.randn(1, 4, 3, 8, 12), torch.randn(1, text, 8)))
    sites = {site.node: site for site in find_attention(view).sites}
    outputs = view.graph.output_node().all_input_nodes
    return {name: (view, sites[node]) for name, node in zip(cases, outputs, strict=True)}


@dataclass(frozen=True)
class Case:
    """An attention over video and text; what is said of its text and first video token, or why it is refused."""

    attention: Any
    says: str
    first: int = 0
    text: int = 7
    order: str = "bcthw"
    grid: Any = None

    def layout(self, name: str) -> VideoLayout | Refusal:
        return video_layout(*toys(self.text, self.order)[name], self.grid)


def both(video: Tensor, text: Tensor, text_first: bool = False) -> Tensor:
    return torch.cat([text, video] if text_first else [video, text], 1)


FOUND = {
    "video alone": Case(lambda video, text: attend(video), "none"),
    "text last": Case(lambda video, text: attend(both(video, text)), "7 last"),
    "text first": Case(lambda video, text: attend(both(video, text, True)), "7 first", first=7),
    "text on both sides": Case(
        lambda video, text: attend(torch.cat([text[:, :3], video, text[:, 3:]], 1)), "7 on both sides", first=3
    ),
    "cut and joined again": Case(
        lambda video, text: attend(torch.cat([both(video, text)[:, :-7], text * 2], 1).relu()), "7 last"
    ),
    "frames cut off and joined again": Case(
        lambda video, text: attend(torch.cat([video[:, :24], video[:, 24:], text], 1)), "7 last"
    ),
    "turned around by a split": Case(
        lambda video, text: attend(torch.cat(both(video, text).split([72, 7], 1)[::-1], 1)), "7 first", first=7
    ),
    "video after an attention": Case(
        lambda video, text: attend(attend(both(video, text)).transpose(1, 2).flatten(2)[:, :72] + video), "none"
    ),
    "text as long as the video": Case(
        lambda video, text: attend(both(video, text, True)), f"{VIDEO} first", first=VIDEO, text=VIDEO
    ),
}

NOT_FOUND = {
    "text alone": Case(
        lambda video, text: attend(text),
        "no part of the sequence has 72 tokens, as the grid asks for (tokens=7, grid=3 x 4 x 6, made of=7)",
    ),
    "text alone, as long as the video": Case(
        lambda video, text: attend(text), "its tokens do not come from the video's patches", text=VIDEO
    ),
    "another grid": Case(
        lambda video, text: attend(both(video, text)),
        "no part of the sequence has 60 tokens, as the grid asks for (tokens=79, grid=3 x 4 x 5, made of=72 + 7)",
        grid=(3, 4, 5),
    ),
    "a dynamic height": Case(
        lambda video, text: attend(video),
        "height or width of the grid is dynamic (grid=(3, None, 6))",
        grid=(3, None, 6),
    ),
    "no grid at all": Case(
        lambda video, text: attend(video),
        "the grid is not (frames, height, width) in tokens (grid=(3, 4))",
        grid=(3, 4),
    ),
    "columns before rows": Case(
        lambda video, text: attend(video), "video tokens are not in the order frame, row, column", order="bctwh"
    ),
    "frames last": Case(
        lambda video, text: attend(both(video, text)),
        "video tokens are not in the order frame, row, column",
        order="bchwt",
    ),
    "keys in another order": Case(
        lambda video, text: attend(both(video, text), both(video, text, True)),
        "queries, keys and values do not have the video at the same places",
    ),
    "keys that are other tokens": Case(
        lambda video, text: attend(video, text),
        "queries and keys come from different tokens (cross attention)",
        text=VIDEO,
    ),
    "causal": Case(
        lambda video, text: attend(video, is_causal=True), "the mask is not the same for all queries (mask=causal"
    ),
    "a band": Case(
        lambda video, text: attend(video, None, torch.ones(VIDEO, VIDEO, dtype=torch.bool).tril(4)),
        "the mask is not the same for all queries (mask=unknown",
    ),
    "a mask for each head": Case(
        lambda video, text: attend(video, None, (video[..., :2].transpose(1, 2) > 0)[:, :, None]),
        "the mask is not the same for all queries",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_video_is_followed_through_joins_and_cuts(name: str) -> None:
    case = FOUND[name]
    layout = case.layout(name)
    assert isinstance(layout, VideoLayout), layout
    assert (layout.describe()["text"], layout.first, layout.tokens) == (case.says, case.first, VIDEO)


@pytest.mark.parametrize("name", NOT_FOUND)
def test_near_misses_say_why(name: str) -> None:
    refusal = NOT_FOUND[name].layout(name)
    assert isinstance(refusal, Refusal), refusal
    assert str(refusal).startswith(NOT_FOUND[name].says)


def key_mask(text: Tensor) -> Tensor:
    return nn.functional.pad(text.sum(-1) > 0, (VIDEO, 0), value=True)[:, None, None]


KEY_MASKS = {
    "bool": lambda text: key_mask(text),
    "expanded": lambda text: key_mask(text).expand(-1, 2, VIDEO + 7, -1),
    "repeated": lambda text: key_mask(text).repeat(1, 2, VIDEO + 7, 1),
    "added": lambda text: nn.functional.pad(text.sum(-1), (VIDEO, 0))[:, None, None],
}
MASKED = {
    name: Case(lambda video, text, mask=mask: attend(both(video, text), None, mask(text)), "7 last")
    for name, mask in KEY_MASKS.items()
}
CASES = FOUND | NOT_FOUND | MASKED


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_keys_are_facts(name: str) -> None:
    layout = MASKED[name].layout(name)
    assert isinstance(layout, VideoLayout), layout
    assert layout.key_mask is not None
    assert shape_of(layout.key_mask) == (1, 1, 1, VIDEO + 7)
    assert layout.describe()["key mask"] == layout.key_mask.name


def test_without_patches_the_grid_is_given_and_checked() -> None:
    class Flat(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return attend(tokens)

    view = GraphView(functional(Flat(), torch.randn(1, 24, 8)))
    (site,) = find_attention(view).sites
    assert "give grid=(frames, height, width)" in str(video_layout(view, site))
    image = video_layout(view, site, (1, 4, 6))
    assert isinstance(image, VideoLayout)
    assert image.describe()["grid"] == "1 x 4 x 6 (an image)"
    unknown_frames = video_layout(view, site, (None, 2, 6))
    assert isinstance(unknown_frames, VideoLayout)
    assert unknown_frames.frames == 2
    assert "a multiple of 35 tokens" in str(video_layout(view, site, (None, 5, 7)))


def test_what_could_be_either_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return attend(both(one, other))

    view = GraphView(functional(Two(), torch.randn(1, 24, 8), torch.randn(1, 24, 8)))
    refusal = video_layout(view, find_attention(view).sites[0], (1, 4, 6))
    assert str(refusal).startswith("several parts of the sequence could be the video")
