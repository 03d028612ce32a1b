"""Engines of TensorRT-RTX for Ada and Blackwell: how long their builds take, and how large they are.

python -m graphwright.benchmarks.engines --layers 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import graphwright as gw
from graphwright.benchmarks.timing import one_thread
from graphwright.examples.load_minilm import load_minilm
from graphwright.examples.load_smollm2 import load_smollm2
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan

CARDS = ("sm_89", "sm_120")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="use only this many layers of SmolLM2")
    options = parser.parse_args()
    table = Table(
        "program", "phase", "weights, MB", "engine, MB", "layers as parsed", "parse and build, s", "largest sizes"
    )
    with one_thread():
        for name, program in programs(options.layers):
            for row in rows(program):
                table.add_row(name, *row)
    Console().print(table)


def programs(layers: int | None) -> Iterator[tuple[str, gw.Program]]:
    """Canonical SmolLM2, MiniLM and the small Wan, and SmolLM2 with int8 linears."""
    captured = gw.capture_causal_lm(load_smollm2(layers=layers), 512)
    yield "SmolLM2", gw.optimize(captured, progress=False)
    yield "SmolLM2, Int8", gw.optimize(captured, methods=[gw.Int8()], keep="smaller", progress=False)
    model, tokenizer = load_minilm()
    text = tokenizer(["A sentence of some words.", "Another."], padding=True, return_tensors="pt")
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
    example = (text["input_ids"], text["attention_mask"])
    yield "MiniLM", gw.optimize(model, example, dynamic_shapes=(sizes, sizes), progress=False)
    inputs = {
        "hidden_states": torch.zeros(1, 12, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": load_prompts()["bikes"],
    }
    yield "small Wan", gw.optimize(gw.capture_denoiser(load_tiny_wan(), inputs), progress=False)


def rows(program: gw.Program) -> Iterator[list[str]]:
    """One for each phase, and one for the whole export."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.engine")
        started = time.perf_counter()
        program.export(path, compute_capabilities=CARDS)
        seconds = time.perf_counter() - started
        for phase in json.loads(path.with_name("model.engine.json").read_text())["phases"]:
            size = path.with_name(phase["file"]).stat().st_size
            largest = ", ".join(f"{name} {ends[-1]}" for name, ends in phase["sizes"].items())
            yield [
                phase["plan"]["name"],
                f"{program.weight_bytes() / 1e6:.0f}",
                f"{size / 1e6:.0f}",
                str(len(phase["layers"])),
                f"{phase['seconds']:.1f}",
                largest or "fixed",
            ]
    yield ["all, with the ONNX", "", "", "", f"{seconds:.0f}", ""]


if __name__ == "__main__":
    main()
