"""The table of sparse video attention on the small Wan model: what is measured, and what is wanted of it."""

from __future__ import annotations

from pathlib import Path
from shutil import which
from typing import Any

from rich.console import Console

import graphwright as gw
from graphwright.benchmarks import compact_search, video
from graphwright.benchmarks.block_sparse import against_dense
from graphwright.benchmarks.timing import Row, one_thread
from graphwright.benchmarks.video_pictures import write_frames, write_masks

DENSE = 0.2
"""Share of the steps that run dense first."""
COST = 1.0
"""Compact Attention's cost limit here: recall alone decides. The published 0.011 is for maps of hundreds of tiles a
frame; on 16 tiles a frame it lets hardly anything go (the row of costs shows it)."""


def video_table(quick: bool, output: Path, console: Console) -> tuple[list[Row], dict[str, Any]]:
    """Measure it, and write the pictures.

    Args:
        quick: 10 steps instead of 30, and half the frames.
        output: Folder for the pictures.
        console: Where to say what is being measured.
    """
    setting = video.Setting(8, 64, 10) if quick else video.Setting(16, 64, 30)
    small = video.Setting(4, 64, 10) if quick else video.Setting(8, 64, 30)
    measured: dict[str, Any] = {"tokens": setting.tokens, "steps": setting.steps, "tokens of curves": small.tokens}
    methods = {
        "RainFusion": gw.RainFusion(dense_steps=DENSE),
        "Compact Attention": gw.CompactAttention(dense_steps=DENSE, cost=COST),
    }
    with one_thread(), console.status("sampling densely for calibration") as status:
        _ = setting.calls, setting.reference
        status.update("whole samplings, dense and sparse in turn")
        measured["whole sampling"] = video.whole_sampling(setting, methods, rounds=1 if quick else 2)
        status.update("RainFusion 2.0")
        best = gw.RainFusion(dense_steps=DENSE, version=2, sparsity=0.5, block_size=64)
        measured["version 2"] = video.quality(setting, best)
        status.update("equal density")
        measured["equal density"] = video.equal_density(setting, DENSE, cost=COST)
        status.update("curves")
        measured["curve"] = video.curve(small, _curve(quick))
        status.update("ablations")
        measured["families"] = video.families(small, DENSE, COST)
        shares = (0.0, 0.2) if quick else (0.0, 0.1, 0.2, 0.3, 0.4)
        measured["start"] = video.start_steps(small, gw.RainFusion, shares)
        two = {"three types": methods["RainFusion"], "two types": gw.RainFusion(dense_steps=DENSE, textural=False)}
        measured["types"] = video.curve(small, two)
        status.update("the operator")
        measured["operator"] = {
            kind: against_dense(
                "cpu", kind, tokens=2048 if quick else 8192, heads=4, head_dim=64, block_size=128, density=0.25,
                rounds=3 if quick else 6, flex=kind == "random" and _has_compiler(),
            )
            for kind in ("random", "band", "tile")
        }  # fmt: skip
        status.update("search")
        measured["search"] = video.search_seconds(setting, DENSE)
        measured["mass memory"] = compact_search.mass_memory((2048, 8192))
        measured["arm"] = compact_search.arm_arithmetic()
    frames = {"dense": setting.reference}
    frames |= {name: setting.sample(setting.optimize(method)) for name, method in methods.items()}
    write_frames(output / "video-frames.png", frames)
    types = write_masks(output / "video-masks.png", setting.grid)
    console.print(f"wrote {output / 'video-frames.png'} ({', '.join(frames)}, from top to bottom)")
    console.print(f"wrote {output / 'video-masks.png'} ({', '.join(types)}, from left to right)")
    return _rows(measured), measured


def _has_compiler() -> bool:
    """Whether torch.compile, which FlexAttention needs on a CPU, can find a C++ compiler."""
    return any(which(name) for name in ("g++", "clang++", "c++"))


def _curve(quick: bool) -> dict[str, gw.Method]:
    sparsities = (0.5, 0.75) if quick else (0.3, 0.5, 0.64, 0.75)
    recalls = (0.95, 0.9) if quick else (0.98, 0.95, 0.9, 0.8)
    costs = (0.011, 0.3) if quick else (0.011, 0.1, 0.3)
    return {
        **{f"RainFusion sparsity {s}": gw.RainFusion(dense_steps=DENSE, sparsity=s) for s in sparsities},
        "RainFusion+ alpha 0.9": gw.RainFusion(dense_steps=DENSE, adaptive_bandwidth=True),
        **{f"Compact recall {r}": gw.CompactAttention(dense_steps=DENSE, recall=r, cost=COST) for r in recalls},
        **{f"Compact cost {c}": gw.CompactAttention(dense_steps=DENSE, cost=c) for c in costs},
    }


def _rows(measured: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    size = f"{measured['tokens']} tokens, {measured['steps']} steps"
    for name, found in measured["whole sampling"].items():
        if name != "dense":
            text = f"{found['speedup']:.2f}x at density {found['density']:.2f}, {_quality(found)}"
            holds = found["speedup"] > 1 and found["psnr"] >= 30
            rows.append((f"{name}, whole sampling, {size}", text, "1x, 30 dB", holds))
    found = measured["version 2"]
    text = f"density {found['density']:.2f}, recall {found['recall']:.3f}, {_quality(found)}"
    rows.append((f"RainFusion 2.0 sparsity 0.5, {size}", text, "-", True))
    equal = measured["equal density"]
    ordered = list(equal.values())
    for figure, form in (("recall", "{:.3f}"), ("psnr", "{:.2f} dB")):
        values = [each[figure] for each in ordered]
        text = ", ".join(f"{name} {form.format(each[figure])}" for name, each in equal.items())
        falling = values == sorted(values, reverse=True)
        rows.append((f"{figure} at density {ordered[0]['density']:.2f}", text, "falling", falling))
    for name, found in {**measured["curve"], **measured["start"], **measured["types"]}.items():
        text = f"density {found['density']:.2f}, recall {found['recall']:.3f}, {_quality(found)}"
        rows.append((f"{name} ({measured['tokens of curves']} tokens)", text, "-", True))
    for family, found in measured["families"].items():
        text = ", ".join(f"{shape} {value:.3f}" for shape, value in found.items())
        rows.append((f"sparsity with {family} windows", text, "-", True))
    for kind, found in measured["operator"].items():
        ratio = found["speedup"]
        flex = ratio.get("FlexAttention")
        text = f"{ratio['block_sparse_attention']:.2f}x of dense at density {found['density']:.2f}"
        text += "" if flex is None else f"; FlexAttention {flex:.2f}x"
        holds = ratio["block_sparse_attention"] >= max(2.5, flex or 0)
        rows.append((f"block_sparse_attention, CPU, {kind} lists", text, "2.5x, FlexAttention", holds))
    for row in measured["arm"]:
        wanted = row["2 / (T - 1)^2"]
        text = f"{row['of scores']:.3%} of the score map, {row['of attention']:.3%} of dense attention"
        holds = abs(row["of scores"] / wanted - 1) <= 0.2
        rows.append((f"ARM's operations, grid {row['grid']}", text, f"{wanted:.3%} +- 20%", holds))
    (few, small), (many, large) = measured["mass memory"].items()
    text = f"{small['MiB']} MiB at {few} tokens, {large['MiB']} at {many} (one map: {large['map MiB']:.0f})"
    holds = large["MiB"] < small["MiB"] * (many / few) ** 1.5
    rows.append(("tile_mass, memory beside its inputs", text, "not as N^2", holds))
    search = measured["search"]
    text = f"{search['seconds']:.1f} s for {search['configurations']} heads and {search['prompts']} prompts"
    rows.append(("search of Compact Attention", text, "300 s", search["seconds"] <= 300))
    return rows


def _quality(found: dict[str, Any]) -> str:
    return f"PSNR {found['psnr']:.1f} dB, SSIM {found['ssim']:.3f}"
