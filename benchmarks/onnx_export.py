"""SmolLM2-135M and the small Wan in ONNX Runtime: errors, tokens, perplexity and times of what `Program.export` writes.

Canonical programs are timed against a plain `torch.onnx.export(dynamo=True)` of the same model, int8 ones against the
canonical one in the same runtime; one thread, in turn, minima. The plain export has no cache, so only prefill is
compared. The Wan's videos are sampled twice, by PyTorch and by ONNX Runtime, from the same noise.

    python benchmarks/onnx_export.py --layers 2
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.examples.perplexity import perplexity, read_text, token_windows
from graphwright.examples.sample_video import noise_levels, sample
from graphwright.lowering.to_onnx.session import OrtSession
from graphwright.quality import psnr

LENGTH = 512
PROMPT = "The most important thing to know about the history of the printing press is that"


class Plain(nn.Module):
    """Tokens to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """The model's call."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def export_plain(model: nn.Module, path: Path, opset: int | None) -> OrtSession:
    """What PyTorch writes by itself."""
    sizes = ({1: torch.export.Dim("length", min=2, max=8192)},)
    torch.onnx.export(
        Plain(model).eval(), (torch.zeros(1, 16, dtype=torch.int64),), path, dynamo=True, dynamic_shapes=sizes,
        opset_version=opset, external_data=True, verbose=False,
    )  # fmt: skip
    return OrtSession(path, threads=1)


def logits_of(run: Any) -> Any:
    """A program or an opened model as a function from tokens [1, S] to logits."""

    def logits(tokens: Tensor) -> Tensor:
        run.reset()
        return run(tokens, torch.arange(tokens.shape[1]))

    return logits


def fill(run: Any, tokens: Tensor) -> Any:
    """A prefill; whatever the cache holds, it is written over."""
    positions = torch.arange(tokens.shape[1])
    return lambda: run(tokens, positions)


def step(run: Any) -> Any:
    """One token behind a prompt of `LENGTH`."""
    token, position = torch.tensor([[504]]), torch.tensor([LENGTH])
    return lambda: run(token, position)


def greedy(run: Any, prompt: Tensor, count: int) -> list[int]:
    """The most probable tokens behind a prompt."""
    found, logits = [], logits_of(run)(prompt)
    for position in range(prompt.shape[1], prompt.shape[1] + count):
        found.append(int(logits[0, -1].argmax()))
        logits = run(torch.tensor([found[-1:]]), torch.tensor([position]))
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="use only this many of the first layers")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each timing")
    parser.add_argument("--only", choices=("canonical", "int8", "W4A16", "wan"), help="one of the four")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps of the Wan's videos")
    options = parser.parse_args()
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        if options.only != "wan":
            _measure(options, Path(folder))
        if options.only in (None, "wan"):
            _measure_wan(options.steps, Path(folder))


def _measure(options: argparse.Namespace, folder: Path) -> None:
    model, tokenizer = load_smollm2(layers=options.layers), load_tokenizer()
    windows = token_windows(tokenizer, read_text("evaluation"), LENGTH, options.windows)
    tokens, prompt = windows[:1], torch.tensor([tokenizer(PROMPT)["input_ids"]])
    captured = gw.capture_causal_lm(model, 2 * LENGTH)

    canonical = gw.optimize(captured, progress=False)
    exact = export(canonical, folder, "canonical", "portable")
    if options.only in (None, "canonical"):
        _measure_canonical(model, canonical, exact, tokens, prompt, folder, options.rounds)
    methods = {
        "int8": (gw.Int8(), ("portable", "ort")),
        "W4A16": (gw.DartQuant(weights="rtn", rotate="never", activation_bits=16), ("portable", "ort")),
    }
    for name, (method, choices) in methods.items():
        if options.only not in (None, name):
            continue
        program = gw.optimize(captured, methods=[method], keep="smaller", progress=False)
        before = perplexity(logits_of(program), windows, progress=False)
        opened = {ops: export(program, folder, name, ops) for ops in choices}
        for ops, run in opened.items():
            after = perplexity(logits_of(run), windows, progress=False)
            print(f"{name}, {ops}: perplexity {before:.3f} in PyTorch, {after:.3f} here ({after / before - 1:+.2%})")
        prefills = {ops: fill(run, tokens) for ops, run in opened.items()}
        times = interleaved({"fp32": fill(exact, tokens), **prefills}, options.rounds)
        decode = interleaved(
            {"fp32": step(exact), **{ops: step(run) for ops, run in opened.items()}}, 5 * options.rounds
        )
        for ops in choices:
            prefill, token = times["fp32"] / times[ops], decode["fp32"] / decode[ops]
            print(f"{name}, {ops}: prefill {prefill:.2f}x of fp32, decode {token:.2f}x", flush=True)


def _measure_canonical(
    model: nn.Module, canonical: gw.Program, exact: Any, tokens: Tensor, prompt: Tensor, folder: Path, rounds: int
) -> None:
    plain = {
        f"plain, opset {opset or 'default'}": export_plain(model, folder / f"p{opset}.onnx", opset)
        for opset in (None, 23)
    }
    wanted, found = logits_of(canonical)(tokens), logits_of(exact)(tokens)
    print(f"canonical: error {float((found - wanted).abs().max() / wanted.abs().max()):.1e} of the largest logit")
    print(f"canonical: greedy tokens identical: {greedy(exact, prompt, 64) == greedy(canonical, prompt, 64)}")
    runs = {name: lambda session=session: session.run({"input_ids": tokens}) for name, session in plain.items()}
    times = interleaved(
        {**runs, "canonical": fill(exact, tokens), "eager": fill(canonical, tokens)},
        rounds,
    )
    print("prefill of 512:", {name: f"{seconds:.3f} s" for name, seconds in times.items()}, flush=True)


def _measure_wan(steps: int, folder: Path) -> None:
    """Whole samplings of the whole model, 8 frames of 64 x 64 pixels, 2048 tokens."""
    prompt = load_prompts()["bikes"]
    inputs = {
        "hidden_states": torch.zeros(1, 12, 8, 32, 32),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": prompt,
    }
    captured = gw.capture_denoiser(load_tiny_wan(), inputs, timesteps=1000 * noise_levels(steps)[:-1])

    def video(denoise: Any) -> Tensor:
        return sample(denoise, prompt, frames=8, height=64, width=64, steps=steps, seed=1)

    for method in (gw.RainFusion(), gw.CompactAttention()):
        program = gw.optimize(captured, methods=[method], calibration=[video], keep="smaller", progress=False)
        opened = export(program, folder, method.name, "portable")
        wanted = video(program.as_module())
        found = video(lambda opened=opened, **given: (opened(**{name: given[name] for name in opened.inputs}),))
        error = float((found - wanted).norm() / wanted.norm())
        print(
            f"{method.name}: {steps} steps, PSNR {psnr(found, wanted):.1f} dB, relative error {error:.1e}", flush=True
        )


def export(program: gw.Program, folder: Path, name: str, ops: str) -> Any:
    """Write a program, print what its files weigh, and open it."""
    path = folder / f"{name}-{ops}.onnx"
    files = program.export(path, ops=ops)
    size = sum(file.stat().st_size for file in files)
    print(
        f"{name}, {ops}: {len(files)} files, {size / 1e6:.1f} MB, {size / program.weight_bytes():.4f} of the weights",
        flush=True,
    )
    return gw.load(path, provider="CPUExecutionProvider", threads=1)


if __name__ == "__main__":
    main()
