"""Packed key-value caches of SmolLM2: uniform tables, searched tables, samplers against each other, greedy texts.

    python -m graphwright.benchmarks.kv_cache uniform --mode per_token
    python -m graphwright.benchmarks.kv_cache search --bits 4.0 5.0 --trials 60
    python -m graphwright.benchmarks.kv_cache samplers --trials 100 --layers 8
    python -m graphwright.benchmarks.kv_cache greedy
    python -m graphwright.benchmarks.kv_cache greedy-roundings --prompts 20

Each prints its lines as it goes. Perplexities are decoded through the packed cache (`profiles/decode_loss.py`).
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.greedy_roundings import greedy_roundings
from graphwright.benchmarks.timing import one_thread
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import read_text, token_windows
from graphwright.profiles.decode_loss import block_of, decode_loss
from graphwright.profiles.search_bits import Trial, pareto_front

UNIFORM = ((8, 8), (8, 4), (4, 8), (4, 4), (8, 2), (2, 8), (4, 2), (2, 4), (2, 2))


def windows(split: Any, length: int, count: int) -> Tensor:
    return token_windows(load_tokenizer(), read_text(split), length, count)


class Study:
    """One model, its canonical program and its evaluation text.

    Attributes:
        layers: Of the model.
        loss: Of the canonical program, nats a token.
    """

    def __init__(self, layers: int | None, count: int) -> None:
        model = load_smollm2(layers=layers)
        self.layers = int(model.config.num_hidden_layers)
        self.captured = gw.capture_causal_lm(model, max_cache_len=512)
        self.calibration = windows("calibration", 256, 2)
        self.evaluation = [window[None] for window in windows("evaluation", 512, count)]
        self.canonical = gw.optimize(self.captured, progress=False)
        self.loss = decode_loss(self.canonical, self.evaluation)

    def program(self, **options: Any) -> gw.Program:
        """What KVTuner makes with these options."""
        method = gw.KVTuner(**options)
        return gw.optimize(self.captured, methods=[method], calibration=self.calibration, progress=False)

    def rise(self, program: gw.Program, mode: str) -> float:
        """By how much the perplexity rises, as a share."""
        return math.exp(decode_loss(program, self.evaluation, block_of(mode)) - self.loss) - 1

    def uniform(self, mode: str, pairs: Sequence[tuple[int, int]]) -> None:
        """One pair for all layers."""
        for pair in pairs:
            program = self.program(table=(pair,) * self.layers, mode=mode)
            share = program.state_bytes() / self.canonical.state_bytes()
            print(f"uniform | {mode} | K{pair[0]}V{pair[1]} | {self.rise(program, mode):+.2%} | {share:.3f} of float32")

    def search(self, mode: str, bits: float, trials: int, **options: Any) -> dict[str, Any]:
        """A searched table; returns what is kept of the search."""
        started = time.perf_counter()
        program = self.program(mode=mode, bits=bits, trials=trials, objective="divergence", **options)
        seconds = time.perf_counter() - started
        found = program.profile.measured["kvtuner"]
        table = Counter("K{}V{}".format(*pair) for pair in found["table"])
        share = program.state_bytes() / self.canonical.state_bytes()
        said = f"{found['bits']:.3f} bits | {self.rise(program, mode):+.2%} | {share:.3f} of float32"
        print(f"search | {mode} | at most {bits} | {said} | {dict(table)} | {seconds:.0f} s", flush=True)
        return found

    def samplers(self, mode: str, bits: float, trials: int) -> None:
        """How much of the plane each sampler's front dominates, for three seeds."""
        for seed in range(3):
            areas = {}
            for sampler in ("nsga2", "random"):
                found = self.search(mode, bits, trials, sampler=sampler, seed=seed)
                areas[sampler] = hypervolume([(t["bits"], t["value"]) for t in found["trials"]])
            print(f"samplers | seed {seed} | " + " | ".join(f"{k} {v:.4f}" for k, v in areas.items()), flush=True)

    def greedy(self, prompts: int, tokens: int) -> None:
        """Of how many greedy tokens a cache of 8 bits agrees with the full one."""
        program = self.program(table=((8, 8),) * self.layers)
        same = 0
        for prompt in windows("evaluation", 32, prompts):
            texts = [each.generate(prompt[None], tokens)[0, -tokens:] for each in (self.canonical, program)]
            same += int((texts[0] == texts[1]).sum())
        print(f"greedy | K8V8 | {same / prompts / tokens:.1%} of {prompts} x {tokens} tokens agree", flush=True)


def roundings(layers: int | None, prompts: int, tokens: int) -> None:
    """The same for ways to round a cache that no operator has, and how near the two best tokens are."""
    for row in greedy_roundings(load_smollm2(layers=layers), windows("evaluation", 32, prompts), tokens):
        texts = f"{row.tokens:.1%} of tokens, {row.until:.1%} before the first other, {row.texts} of {prompts} texts"
        steps = f"{row.steps:.2%} of steps, gap {row.error:.4f}, {row.close:.2%} closer"
        print(f"roundings | {row.name} | {row.of_float16:.3f} of float16 | {texts} | {steps}", flush=True)


def hypervolume(points: Sequence[tuple[float, float]], corner: tuple[float, float] = (8.0, 2.0)) -> float:
    """The area between a front of (bits, value) and a corner that is worse than all of it."""
    front = pareto_front([Trial((), bits, value) for bits, value in points if value < corner[1]])
    edges = [*(trial.bits for trial in front[1:]), corner[0]]
    return sum((right - trial.bits) * (corner[1] - trial.objective) for trial, right in zip(front, edges, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["uniform", "search", "samplers", "greedy", "greedy-roundings"])
    parser.add_argument("--mode", default="per_token", choices=["per_token", "kivi"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--sensitivity", default="effect", choices=["effect", "attention"])
    parser.add_argument("--prompts", type=int, default=20, help="of the greedy texts")
    options = parser.parse_args()
    with one_thread(), torch.no_grad():
        if options.part == "greedy-roundings":
            roundings(options.layers, options.prompts, 64)
            return
        study = Study(options.layers, options.windows)
        print(f"full precision | perplexity {math.exp(study.loss):.3f}", flush=True)
        if options.part == "uniform":
            study.uniform(options.mode, UNIFORM)
        elif options.part == "search":
            for bits in options.bits:
                study.search(options.mode, bits, options.trials, sensitivity=options.sensitivity)
        elif options.part == "samplers":
            study.samplers(options.mode, options.bits[0], options.trials)
        else:
            study.greedy(options.prompts, 64)


if __name__ == "__main__":
    main()
