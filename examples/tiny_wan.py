"""A small trained video diffusion transformer, dense, sparse and with reuse: `python examples/tiny_wan.py`.

Prints time, density, recall, what was saved and the distance from the dense video for each method. The checksum of a
video is the same in another process that replays the profile: `--save-profile p.json`, then `--profile p.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.timing import one_thread
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.examples.sample_video import noise_levels, sample, write_png_grid
from graphwright.inspection.tables import Table
from graphwright.quality import compare

METHODS = {
    "rainfusion": lambda dense: gw.RainFusion(dense_steps=dense),
    # The published cost limit is for maps of hundreds of tiles a frame; with sixteen, recall alone is to decide.
    "compact_attention": lambda dense: gw.CompactAttention(dense_steps=dense, cost=1.0),
    # By whole tokens, which is what saves time; more than a third of the scores costs this model's video too much.
    "timeripple": lambda dense: gw.TimeRipple(dense_steps=dense, saving=0.3),
    "astraea": lambda dense: gw.Astraea(plan="uniform"),
}
_BUDGETS = (10, 4, 7, 0, 10, 10, 8, 4, 10, 7, 2, 4, 0, 10, 0, 1, 1, 6, 4, 6, 3, 1, 10, 0, 9, 1, 5, 6, 4, 7)
"""Found by `graphwright bench reuse` on one prompt, at 4 frames of 32x32 pixels: 15 of 30 steps' tokens in all."""
SEARCHED = {"astraea": (len(_BUDGETS), {"table": _BUDGETS})}
"""Method -> the number of steps for which a search found options, and these."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["all", "none", *METHODS], default="all")
    parser.add_argument("--prompt", default="bikes", help="one of the four prompts that the model was trained on")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels; a token is 4x4 of them")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dense", type=float, default=0.2, help="share of the steps that run dense first")
    parser.add_argument("--keep", choices=["faster", "smaller"], default="faster")
    parser.add_argument("--png", type=Path, help="write frames here, the dense video above the others")
    parser.add_argument("--save-profile", type=Path, help="write the profile of the last method here")
    parser.add_argument("--profile", type=Path, help="replay this profile instead of deciding")
    parser.add_argument("--report", action="store_true", help="print the report of each program")
    options = parser.parse_args()
    with one_thread():
        _run(options, Console())


def _run(options: argparse.Namespace, console: Console) -> None:
    model, prompt = load_tiny_wan(), load_prompts()[options.prompt]
    inputs = {
        "hidden_states": torch.zeros(1, 12, options.frames, options.size // 2, options.size // 2),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": prompt,
    }
    captured = gw.capture_denoiser(model, inputs, timesteps=1000 * noise_levels(options.steps)[:-1])
    frames, height, width = captured.facts["grid"]
    console.print(f"latent grid {frames} x {height} x {width}: {frames * height * width} tokens")

    def sampler(denoise: Callable[..., Any], seed: int = 1) -> Tensor:
        return sample(
            denoise, prompt, frames=options.frames, height=options.size, width=options.size, steps=options.steps,
            seed=seed,
        )  # fmt: skip

    programs = {"dense": gw.optimize(captured)}
    if options.profile is not None:
        programs[options.profile.name] = gw.optimize(captured, profile=options.profile)
    elif options.method != "none":
        for name in METHODS if options.method == "all" else [options.method]:
            method = _method(name, options)
            programs[name] = gw.optimize(captured, methods=[method], calibration=[sampler], keep=options.keep)
    videos = _compare(programs, lambda program: sampler(program, seed=0), console)
    for name, program in list(programs.items())[1:]:
        if options.report:
            console.rule(name)
            console.print(program.report())
        if options.save_profile is not None:
            program.profile.save(options.save_profile)
    if options.png:
        write_png_grid(options.png, list(videos.values()), range(0, options.frames, max(1, options.frames // 8)))
        console.print(f"wrote {options.png}: {', '.join(videos)}, from top to bottom")


def _method(name: str, options: argparse.Namespace) -> gw.Method:
    steps, found = SEARCHED.get(name, (0, {}))
    method = METHODS[name](options.dense)
    return method.model_copy(update=found) if options.steps == steps else method


def _compare(
    programs: dict[str, gw.Program], run: Callable[[gw.Program], Tensor], console: Console
) -> dict[str, Tensor]:
    """Sample with each program and print what it took and what it gave."""
    table = Table("", "seconds", "speed-up", "sites", "density", "recall", "saved", "PSNR dB", "SSIM", "checksum")
    videos: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for name, program in programs.items():
        started = time.perf_counter()
        videos[name] = run(program)
        seconds[name] = time.perf_counter() - started
        quality = compare(videos["dense"], videos[name])
        kept = [decision for decision in program.decisions if decision.status == "kept"]
        table.add_row(
            name,
            f"{seconds[name]:.1f}",
            f"{seconds['dense'] / seconds[name]:.2f}x",
            str(len(kept)),
            _mean(kept, "density"),
            _mean(kept, "recall"),
            _saved(program),
            "-" if name == "dense" else f"{quality['psnr']:.2f}",
            "-" if name == "dense" else f"{quality.get('ssim', float('nan')):.4f}",
            hashlib.sha256(videos[name].numpy().tobytes()).hexdigest()[:8],
        )
    console.print(table)
    return videos


def _saved(program: gw.Program) -> str:
    """Share of score arithmetic that is reused, or of tokens that are not computed."""
    if "reuse" in program.history.measured:
        return f"{program.history.measured['reuse']['saving']:.3f}"
    astraea = program.profile.measured.get("astraea")
    return f"{1 - astraea['budget']:.3f}" if astraea else "-"


def _mean(kept: list[gw.Decision], figure: str) -> str:
    values = [value for decision in kept for value in decision.figures.get(figure, ())]
    return f"{sum(values) / len(values):.3f}" if values else "-"


if __name__ == "__main__":
    main()
