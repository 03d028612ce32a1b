"""Write SmolLM2 and the small Wan as ONNX (and AOTInductor), run both, and print how far each target is from PyTorch.

Engines of TensorRT-RTX and bundles for TensorRT are written on request; running them needs a GPU of their own.

python -m graphwright.examples.export --layers 2
python -m graphwright.examples.export --layers 2 --engines
python -m graphwright.examples.export --model wan --aoti
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphwright as gw
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.export import compare_targets, dry_run
from graphwright.lowering.compare_targets import TARGETS

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "wan", "both"), default="both")
    parser.add_argument("--layers", type=int, help="use only this many layers of SmolLM2")
    parser.add_argument("--aoti", action="store_true", help="compile AOTInductor packages too: minutes")
    parser.add_argument("--engines", action="store_true", help="write engines and bundles for TensorRT too")
    parser.add_argument("--output", type=Path, help="keep the ONNX files in this folder")
    options = parser.parse_args()
    console = Console()
    if options.model != "wan":
        run("smollm2", *smollm2(options.layers), options, console)
    if options.model != "smollm2":
        run("wan", *wan(), options, console)


def smollm2(layers: int | None) -> tuple[gw.Program, Calls]:
    """SmolLM2 with int8 linears: a prompt, its continuation in one piece, and a token."""
    program = gw.optimize(gw.capture_causal_lm(load_smollm2(layers=layers), 64), methods=[gw.Int8()], keep="smaller")
    text = torch.tensor([load_tokenizer()("The quick brown fox jumps over the lazy dog, and sleeps.")["input_ids"]])
    ends = (0, 6, text.shape[1] - 1, text.shape[1])
    pieces = itertools.pairwise(ends)
    return program, [((text[:, start:end], torch.arange(start, end)), {}) for start, end in pieces]


def wan() -> tuple[gw.Program, Calls]:
    """The small Wan, as captured: one step at two timesteps."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, 4, 16, 16, generator=generator)
    inputs = {"hidden_states": latents, "encoder_hidden_states": load_prompts()["bikes"]}
    captured = gw.capture_denoiser(load_tiny_wan(), {**inputs, "timestep": torch.tensor([500.0])})
    return gw.optimize(captured), [((), {**inputs, "timestep": torch.tensor([t])}) for t in (900.0, 100.0)]


def run(name: str, program: gw.Program, calls: Calls, options: argparse.Namespace, console: Console) -> None:
    """Print what operators become, and the agreement of the targets."""
    console.print(dry_run(program, f"{name}.onnx"))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        for file in program.export(options.output / f"{name}.onnx"):
            console.print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")
    targets = TARGETS if options.aoti else [target for target in TARGETS if target != "aoti"]
    table = Table("target", "largest error", "of the largest value", "tolerance", "holds", title=name)
    for row in compare_targets(program, calls, targets):
        figures = (f"{row.largest:.2e}", f"{row.relative:.2e}", f"{row.tolerance:.1e}")
        table.add_row(row.target, *(("-", row.refused, "-") if row.refused else figures), "yes" if row.holds else "NO")
    console.print(table)
    if options.engines:
        write_engines(name, program, console)


def write_engines(name: str, program: gw.Program, console: Console) -> None:
    """Print what engines and bundles take in bytes and seconds, or why there are none."""
    table = Table("file", "MB", "seconds", title=f"{name}, built and not run")
    for suffix in (".engine", ".zip"):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            try:
                files = program.export(Path(folder, f"{name}{suffix}"))
            except gw.GraphwrightError as error:
                table.add_row(f"{name}{suffix}", "-", str(error))
                continue
            seconds = f"{time.perf_counter() - started:.0f}"
            for file in files:
                table.add_row(file.name, f"{file.stat().st_size / 1e6:.1f}", seconds)
    console.print(table)


if __name__ == "__main__":
    main()
