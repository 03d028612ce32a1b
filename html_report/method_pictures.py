"""The pictures of the package's methods, made from what decisions, profile and history hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.block_lists import keep_of
from ..passes.decision import Decision
from ..patterns.graph import GraphView
from ..patterns.nodes import NotEvaluable
from .picture import Picture, picture
from .png import png_address

if TYPE_CHECKING:
    from ..program import Program

_MOST_SITES = 12
_MOST_ROWS = 8
_MOST_PIXELS = 128


@picture
def budget_frontier(program: Program) -> Picture | None:
    """What was measured while the budget was sought."""
    frontier = program.profile.measured.get("frontier")
    if not frontier or len(frontier) < 2:
        return None
    budget = program.profile.measured["budget"]
    error = budget["metric"] != "evaluate"
    series = [
        {"name": name, "line": False, "points": [[p["gain"], abs(p["score"])] for p in frontier if p["holds"] is holds]}
        for name, holds in (("holds the budget", True), ("does not", False))
    ]
    data = {
        "x": "share of the linear arithmetic that is rewritten",
        "y": "error" if error else "score",
        "series": [each for each in series if each["points"]],
        "level": abs(budget["limit"]),
    }
    return Picture("Budget: error against what is kept", "points", data, "Each point is a measured whole program.")


@picture
def predicted_and_measured(program: Program) -> Picture | None:
    """The speed-up at each site against its share of the arithmetic."""
    groups: dict[str, list[list[float]]] = {}
    for decision in program.decisions:
        if decision.predicted_gain is not None and decision.measured_gain is not None:
            point = [round(decision.predicted_gain, 6), round(decision.measured_gain, 4)]
            groups.setdefault(decision.status.replace("_", " "), []).append(point)
    if not groups:
        return None
    series = [{"name": name, "line": False, "points": points} for name, points in groups.items()]
    data = {"x": "predicted: share of the phase's arithmetic", "y": "measured: speed-up at the site", "series": series}
    return Picture("Predicted against measured gain", "points", data | {"level": 1.0}, "Below 1 the rewrite is slower.")


@picture
def errors_by_layer(program: Program) -> list[Picture]:
    """Error and sensitivity of linears by layer and role, in the phase that has most of them."""
    errors = {d.site: d.local_error for d in program.decisions if d.local_error is not None}
    sensitivity = {d.site: d.figures["sensitivity"] for d in program.decisions if "sensitivity" in d.figures}
    made = (
        _by_layer_and_role(program, errors, "Error at the site's output", "relative L2 error", True),
        _by_layer_and_role(program, sensitivity, "Sensitivity to sparse activations", "", False),
    )
    return [each for each in made if each is not None]


def _by_layer_and_role(
    program: Program, values: Mapping[str, float], title: str, unit: str, percent: bool
) -> Picture | None:
    phases: dict[str, list[Decision]] = {}
    for decision in program.decisions:
        if decision.site in values and "role" in decision.facts and "/linear[" in decision.site:
            phases.setdefault(decision.phase, []).append(decision)
    if not phases:
        return None
    phase, decisions = max(phases.items(), key=lambda item: len(item[1]))
    rows = list(dict.fromkeys(_layer(d.place) for d in decisions))
    columns = list(dict.fromkeys(d.facts["role"] for d in decisions))
    cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    for d in decisions:
        cells[rows.index(_layer(d.place))][columns.index(d.facts["role"])] = values[d.site]
    data = {"rows": rows, "columns": columns, "values": cells, "unit": unit, "short": percent}
    return Picture(f"{title}, {phase}", "heatmap", data, "The same input for both variants.")


@picture
def attention_by_head(program: Program) -> list[Picture]:
    """Head types, recall and density of sparse attentions."""
    kept = [d for d in program.decisions if d.status == "kept"]
    pictures = []
    for title, names, unit in (
        ("Head types", ("type", "shape"), ""),
        ("Recall by head", ("recall",), "attention mass that the kept keys have"),
        ("Density by head", ("density",), "share of the score map that is computed"),
    ):
        found = [(d, next((d.figures[n] for n in names if n in d.figures), None)) for d in kept]
        rows = [(f"{d.phase}: {d.place.rsplit('/', 1)[0]}", list(values)) for d, values in found if values]
        if rows:
            heads = max(len(values) for _, values in rows)
            data = {
                "rows": [label for label, _ in rows],
                "columns": [f"head {head}" for head in range(heads)],
                "values": [values + [None] * (heads - len(values)) for _, values in rows],
                "unit": unit,
            }
            pictures.append(Picture(title, "heatmap", data, "Measured on the first calibration input of each phase."))
    return pictures


@picture
def attention_masks(program: Program) -> Picture | None:
    """Which key blocks each query block keeps, where that does not depend on the input."""
    rows: list[dict[str, Any]] = []
    for name, phase in program.phases.items():
        view = GraphView(phase.exported)
        for node in phase.exported.graph.nodes:
            if str(node.target) == "graphwright.block_sparse_attention.default" and len(rows) < _MOST_SITES:
                maps = _masks(view, node)
                if maps is not None:
                    images = [{"label": f"row {i}", "source": png_address(_shrunk(m))} for i, m in enumerate(maps)]
                    rows.append({"label": f"{name}: {view.module_path(node)}", "images": images})
    caption = (
        "A row of blocks is a query block, a column a key block; blue is computed. Text and the first frame, which "
    )
    caption += "every query sees, are not drawn. Which row a head takes is in its type."
    return Picture("Attention masks", "images", {"rows": rows}, caption) if rows else None


@picture
def density_over_steps(program: Program) -> Picture | None:
    """How much of the attention is computed in each denoising step."""
    shares: dict[int, float] = {}
    sparse = False
    for step in program.profile.steps:
        kept = [d for d in program.decisions if d.phase == step.name and d.status == "kept"]
        known = [density for d in kept if (density := _density(d)) is not None]
        # A sparse attention is no attention site any more: what is left of those is dense.
        total = len(program.sites[step.name].attention) + len(known)
        dense = total - len(known)
        sparse = sparse or bool(known)
        shares |= dict.fromkeys(step.steps, (sum(known) + dense) / total if total else 1.0)
    if not sparse:
        return None
    series = [{"name": "mean density of the attentions", "values": [shares[step] for step in sorted(shares)]}]
    data = {"labels": [str(step) for step in sorted(shares)], "unit": "density", "series": series}
    return Picture("Budget over steps", "bars", data, "Columns are denoising steps; 1 is dense.")


@picture
def budgets_by_step(program: Program) -> Picture | None:
    """ASTRAEA's share of the tokens that each denoising step computes."""
    found = program.profile.measured.get("astraea")
    if not found or not found["budget"]:
        return None
    table = found["table"]
    full = sum(table) / len(table) / found["budget"]
    series = [{"name": "computed", "values": [budget / full for budget in table]}]
    data = {"labels": [str(step) for step in range(len(table))], "unit": "share of the tokens", "series": series}
    return Picture("Tokens computed by step", "bars", data, "Columns are denoising steps; 1 computes all tokens.")


@picture
def reuse_by_step(program: Program) -> Picture | None:
    """TimeRipple's saving in each layer over the steps of the sampled videos."""
    found = program.history.measured.get("reuse")
    if not found or not found["steps"]:
        return None
    layers = list(found["steps"][0]["layers"])
    data = {
        "rows": [layer.rsplit("/", 1)[0] for layer in layers],
        "columns": [f"{step['timestep']:.4g}" for step in found["steps"]],
        "values": [[step["layers"].get(layer) for step in found["steps"]] for layer in layers],
        "unit": "share of the score arithmetic that is saved",
    }
    return Picture("Scores reused by layer and step", "heatmap", data, "Columns are timesteps, the first on the left.")


@picture
def bits_and_loss(program: Program) -> list[Picture]:
    """KVTuner's trials with their Pareto front, and the bits by layer that were chosen."""
    searched = program.profile.measured.get("kvtuner")
    if not searched:
        return []
    series = [
        {"name": "tables tried", "line": False, "points": [[t["bits"], t["value"]] for t in searched["trials"]]},
        {"name": "Pareto front", "line": True, "points": [[t["bits"], t["value"]] for t in searched["front"]]},
        {"name": "chosen", "line": False, "points": [[searched["bits"], searched["value"]]]},
    ]
    data = {
        "x": "mean bits of keys and values",
        "y": searched["objective"],
        "series": series,
        "limit": searched["limit"],
    }
    table = searched["table"]
    bits = {
        "rows": ["keys", "values"],
        "columns": [str(layer) for layer in range(len(table))],
        "values": [[pair[side] for pair in table] for side in (0, 1)],
        "unit": "bits",
    }
    return [
        Picture("Bits against loss", "points", data, "Further left and further down is better."),
        Picture("Bits of the cache by layer", "heatmap", bits, "Columns are layers."),
    ]


@picture
def retrieval_heads(program: Program) -> list[Picture]:
    """RazorAttention's scores by layer and key-value head, and the heads that keep the whole cache."""
    found = program.profile.measured.get("razor")
    if not found:
        return []
    shown = [(f"Retrieval heads: {name}", found.get(name), unit) for name, unit in _SCORES.items()]
    kept = [set(heads) for heads in found["kept"]]
    heads = max((len(row) for _, rows, _ in shown for row in rows or ()), default=0)
    if heads:
        whole = [["whole" if head in layer else "window" for head in range(heads)] for layer in kept]
        shown.append(("Heads that keep the whole cache", whole, ""))
    return [
        Picture(
            title,
            "heatmap",
            {
                "rows": [f"layer {layer}" for layer in range(len(rows))],
                "columns": [f"head {head}" for head in range(heads)],
                "values": rows,
                "unit": unit,
            },
            "Columns are key-value heads.",
        )
        for title, rows, unit in shown
        if rows
    ]


_SCORES = {
    "induction": "attention to what followed an earlier copy of the token",
    "echo": "attention to an earlier copy of the token",
    "reach": "tokens that a head sees back, by its slope",
}


@picture
def hits_and_stalls(program: Program) -> list[Picture]:
    """Where FreeKV found the pages that it chose, and how long each layer waited, since the last reset."""
    layers = program.offload_figures_by_layer()
    if not layers or not layers[0]["steps"]:
        return []
    labels = [str(number) for number in range(len(layers))]
    made = []
    for title, unit, values in (
        ("Pages at hand by layer", "share of the chosen pages", [layer["hit_rate"] for layer in layers]),
        (
            "Time stalled by layer",
            "milliseconds a token",
            [1e3 * layer["stalled"] / layer["steps"] for layer in layers],
        ),
    ):
        data = {"labels": labels, "unit": unit, "series": [{"name": "since the last reset", "values": values}]}
        made.append(Picture(title, "bars", data, "Columns are the layers whose cache is offloaded."))
    return made


@picture
def channels_and_rotation(program: Program) -> list[Picture]:
    """How large the channels of a residual stream are before and after its rotation."""
    pictures = []
    for decision in program.decisions:
        curves = {name: decision.figures.get(f"channels {name}") for name in ("unrotated", "rotated")}
        series = [
            {"name": name, "line": True, "points": [[i / (len(v) - 1), x] for i, x in enumerate(v)]}
            for name, v in curves.items()
            if v and len(v) > 1
        ]
        if len(series) == 2:
            title = f"Channels of the residual stream before and after rotation, {decision.phase}"
            data = {"x": "share of the channels, the largest first", "y": "largest magnitude over the mean"}
            caption = "Of the norms' outputs on calibration. A flat line has no outliers to spend bits on."
            pictures.append(Picture(title, "points", data | {"series": series, "level": 1.0}, caption))
    return pictures


@picture
def video_frames(program: Program) -> list[Picture]:
    """Frames of the dense program's video above those of the rewritten one's."""
    pictures = []
    videos: list[dict[str, Any]] = program.history.measured.get("video_frames") or []
    for number, video in enumerate(videos):
        rows = [
            {"label": name, "images": [{"label": f"frame {f}", "source": source} for f, source in video[name]]}
            for name in ("dense", "rewritten")
        ]
        pictures.append(Picture(f"Video {number + 1}", "images", {"rows": rows}, "The same prompt and the same noise."))
    return pictures


def _layer(place: str) -> str:
    """`model.layers.12.mlp.up_proj/linear[0]` to `layers.12`; without a number the module path."""
    path = place.rsplit("/", 1)[0]
    found = re.search(r"(\w+\.\d+)(?:\.|$)", path)
    return found[1] if found else path


def _density(decision: Decision) -> float | None:
    if "density" in decision.figures:
        values: Sequence[float] = decision.figures["density"]
        return sum(values) / len(values)
    return float(decision.facts["density"]) if "density" in decision.facts else None


def _masks(view: GraphView, node: Any) -> Tensor | None:
    try:
        counts, blocks = (view.evaluate(n, {}, view.assignments([n], 1)[0]) for n in node.args[3:5])
        return keep_of(counts, blocks, int(node.kwargs["key_blocks"]))[:_MOST_ROWS]
    except (NotEvaluable, RuntimeError, TypeError, ValueError):
        return None  # the lists come from the input, or their number is dynamic


def _shrunk(keep: Tensor) -> Tensor:
    """bool [Q, K] as colours [h, w, 3] of at most so many pixels a side, blue where any block is kept."""
    step = max(1, -(-max(keep.shape) // _MOST_PIXELS))
    pooled = torch.nn.functional.max_pool2d(keep[None].float(), step, ceil_mode=True)[0].bool()
    colours = torch.tensor([[238, 241, 246], [29, 95, 191]], dtype=torch.uint8)
    return colours[pooled.long()]
