"""DartQuant against its baselines on SmolLM2: errors of activations, perplexities, cost of calibration, speed.

    python -m graphwright.benchmarks.dartquant errors perplexity cost speed --layers 30 --windows 4

One part a run, each prints its lines as it goes. Rotations other than DartQuant's own are made here, in the same code.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.end_to_end_rotation import QuantizedModel, cayley_step, learn
from graphwright.benchmarks.timing import one_thread
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import perplexity, read_text, token_windows
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.dialects import run_functional
from graphwright.passes.rewrite import apply_decisions
from graphwright.prepare import Prepared, is_exact, prepare, with_exact
from graphwright.profiles.activation_samples import sample_rows
from graphwright.profiles.dartquant import DartQuant
from graphwright.profiles.fit_rotations import Rotations
from graphwright.profiles.method import Context
from graphwright.profiles.profile import fingerprint
from graphwright.profiles.whip import Schedule, fit_rotation, random_hadamard, rounding_error, whip

LR = 1e-2
"""The learning rate for SmolLM2's width of 576; the published one is 1e-3."""


class RandomOrthogonal(DartQuant):
    """Rotations that are Q of a normal matrix."""

    def fit_stream(self, tokens: Tensor, generator: torch.Generator, on_step: Callable[[], None]) -> Tensor:
        """R1."""
        return random_orthogonal(tokens.shape[-1], generator)

    def fit_heads(self, tokens: Tensor, generator: torch.Generator, on_step: Callable[[], None]) -> Tensor:
        """R2."""
        return torch.stack([random_orthogonal(tokens.shape[-1], generator) for _ in tokens])


class Given(DartQuant):
    """Rotations learned elsewhere: R1, then one R2 an attention in graph order."""

    given: ClassVar[list[Tensor]] = []

    def fit_stream(self, tokens: Tensor, generator: torch.Generator, on_step: Callable[[], None]) -> Tensor:
        """R1."""
        return self.given[0]

    def fit_heads(self, tokens: Tensor, generator: torch.Generator, on_step: Callable[[], None]) -> Tensor:
        """The next R2."""
        return self.given.pop(1)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator)).Q


def setting(layers: int | None) -> Prepared:
    """SmolLM2's prefill alone, canonical: all that quality needs."""
    captured = gw.capture_causal_lm(load_smollm2(layers=layers), 512)
    prepared = prepare(captured)
    prepared.phases = [phase for phase in prepared.phases if phase.name == "prefill"]
    prepared.sites = {"prefill": prepared.sites["prefill"]}
    return prepared


def windows(split: Any, count: int) -> Tensor:
    return token_windows(load_tokenizer(), read_text(split), 512, count)


def calls(texts: Tensor) -> list[list[Any]]:
    return [[text[None].contiguous(), torch.arange(texts.shape[1])] for text in texts]


def quantized(
    prepared: Prepared, method: DartQuant, texts: Tensor
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """A program's logits under a method, without measuring sites, and what was decided."""
    started = time.perf_counter()
    context = Context(prepared.exported, prepared.sites, {"prefill": calls(texts)}, prepared.captured.facts)
    decisions = method.decide(context)
    seconds = time.perf_counter() - started
    changed = with_exact(replace(prepared, shared=dict(context.tensors)), decisions)
    exported = copy_exported(changed.exported["prefill"])
    lossy = [decision for decision in decisions if not is_exact(decision)]
    rewriting = apply_decisions(exported, "prefill", lossy, changed.shared)
    assert not rewriting.failed, rewriting.failed
    rewriting.commit()
    kept = sum(is_exact(d) and d.status == "kept" for d in decisions)
    online = sum(bool(d.options.get("hadamard")) for d in decisions)
    return logits_of(exported), {"seconds": seconds, "rotations": kept, "online": online}


def logits_of(exported: Any) -> Callable[[Tensor], Tensor]:
    def logits(tokens: Tensor) -> Tensor:
        return run_functional(exported, [tokens, torch.arange(tokens.shape[1])])[-1]

    return logits


def stream_rows(prepared: Prepared, texts: Tensor, count: int, seed: int) -> Tensor:
    """Rows that readers of the stream get, gain-free, over all layers."""
    streams = prepared.sites["prefill"].residual
    each = -(-count // sum(len(stream.norms) for stream in streams))
    generator = torch.Generator().manual_seed(seed)
    found = sample_rows(prepared.exported["prefill"], calls(texts), streams, [], each, generator)
    return torch.cat(list(found.values()))


def kurtosis(rotated: Tensor) -> Tensor:
    """Mean fourth power over squared second, which a uniform distribution has least of."""
    square = rotated.square()
    return (square.square().mean(-1) / square.mean(-1).square()).mean()


def variance(rotated: Tensor) -> Tensor:
    """Variance over all channels and tokens: their length, which no rotation changes, but for the mean."""
    return rotated.var()


def fit_cayley(tokens: Tensor, start: Tensor, steps: int, lr: float, generator: torch.Generator) -> Tensor:
    """Whip by Cayley SGD in place of QR-Orth."""
    rotation = start.clone()
    for _ in range(steps):
        rows = tokens[torch.randint(0, len(tokens), (2048,), generator=generator)]
        rotation.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(whip(rows @ rotation), rotation)
        rotation = cayley_step(rotation.detach(), gradient, lr)
    return rotation


def errors(prepared: Prepared, texts: Tensor, others: Tensor) -> None:
    """Relative 4-bit error, Whip and time of each rotation, on rows that none was fitted to.

    First on tokens of the same documents as the calibration's (every fourth window is kept for that), then on tokens of
    other documents.
    """
    kept = torch.arange(len(texts)) % 4 == 3
    train = stream_rows(prepared, texts[~kept], 65536, 0)
    test, far = stream_rows(prepared, texts[kept], 4096, 1), stream_rows(prepared, others, 4096, 1)
    width = train.shape[-1]

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def fitted(
        steps: int, lr: float, loss: Callable[[Tensor], Tensor] = whip, schedule: Schedule = "constant"
    ) -> Tensor:
        start = random_hadamard(width, generator())
        options: dict[str, Any] = {"batch": 2048, "generator": generator(), "loss": loss, "schedule": schedule}
        return fit_rotation(train, start, steps=steps, lr=lr, **options)

    candidates: dict[str, Callable[[], Tensor]] = {
        "none": lambda: torch.eye(width),
        "random orthogonal": lambda: random_orthogonal(width, generator()),
        "random Hadamard": lambda: random_hadamard(width, generator()),
        "Whip, QR-Orth, 100 steps at 1e-3 (published)": lambda: fitted(100, 1e-3),
        "Whip, QR-Orth, 100 steps at 1e-2 (DartQuant here)": lambda: fitted(100, LR),
        "Whip, QR-Orth, 100 steps at 1e-1, cosine": lambda: fitted(100, 1e-1, schedule="cosine"),
        "Whip, QR-Orth, 300 steps at 1e-1, cosine": lambda: fitted(300, 1e-1, schedule="cosine"),
        "Whip, QR-Orth, 10 steps at 1e-2": lambda: fitted(10, LR),
        "Whip, Cayley, 10 steps at 1e-2": lambda: fit_cayley(
            train, random_hadamard(width, generator()), 10, LR, generator()
        ),
        "Whip, Cayley, 100 steps at 1e-2": lambda: fit_cayley(
            train, random_hadamard(width, generator()), 100, LR, generator()
        ),
        "kurtosis, QR-Orth, 100 steps at 1e-2": lambda: fitted(100, LR, kurtosis),
        "variance, QR-Orth, 100 steps at 1e-2": lambda: fitted(100, LR, variance),
    }
    for name, make in candidates.items():
        started = time.perf_counter()
        rotation = make()
        seconds = time.perf_counter() - started
        rotated = test @ rotation
        error, beyond = rounding_error(rotated, 4, 0.9), rounding_error(far @ rotation, 4, 0.9)
        facts = f"{error:.5f} | other documents {beyond:.5f} | Whip {float(whip(rotated)):.1f} | {seconds:.1f} s"
        print(f"errors | {name} | {facts}", flush=True)


def qualities(prepared: Prepared, texts: Tensor, evaluation: Tensor, wanted: Sequence[str]) -> None:
    """Perplexity of each setting."""
    dart = {"lr": LR, "group": 64}
    methods: dict[str, Callable[[], DartQuant]] = {
        "W4A4 rtn, no rotation": lambda: DartQuant(**dart, rotate="never", weights="rtn"),
        "W4A4 rtn, random orthogonal": lambda: RandomOrthogonal(**dart, rotate="always", weights="rtn"),
        "W4A4 rtn, random Hadamard": lambda: DartQuant(**dart, rotate="always", steps=0, weights="rtn"),
        "W4A4 rtn, DartQuant": lambda: DartQuant(**dart, rotate="always", weights="rtn"),
        "W4A4 gptq, no rotation": lambda: DartQuant(**dart, rotate="never"),
        "W4A4 gptq, random Hadamard": lambda: DartQuant(**dart, rotate="always", steps=0),
        "W4A4 gptq, DartQuant": lambda: DartQuant(**dart, rotate="always"),
        "W4A4 gptq, DartQuant where it helps": lambda: DartQuant(**dart),
        "W4A4 gptaq, random Hadamard": lambda: DartQuant(**dart, rotate="always", steps=0, weights="gptaq"),
        "W4A4 gptaq, DartQuant": lambda: DartQuant(**dart, rotate="always", weights="gptaq"),
        "W4A4KV4 gptq, DartQuant": lambda: DartQuant(**dart, rotate="always", kv_bits=4),
        "W4A8 rtn, no rotation": lambda: DartQuant(**dart, activation_bits=8, rotate="never", weights="rtn"),
        "W4A8 gptq, no rotation": lambda: DartQuant(**dart, activation_bits=8, rotate="never"),
        "W4A8 gptq, damping 0.01, no rotation": lambda: DartQuant(**dart, activation_bits=8, rotate="never", damp=0.01),
        "W4A8 gptq, DartQuant": lambda: DartQuant(**dart, activation_bits=8, rotate="always"),
        "W4A8 gptq, DartQuant where it helps": lambda: DartQuant(**dart, activation_bits=8),
        "W4A8 gptaq, no rotation": lambda: DartQuant(**dart, activation_bits=8, rotate="never", weights="gptaq"),
        "W4A8 gptaq, DartQuant where it helps": lambda: DartQuant(**dart, activation_bits=8, weights="gptaq"),
        "W8A8, no rotation": lambda: DartQuant(**dart, weight_bits=8, activation_bits=8, rotate="never"),
        "W4A16 gptq, no rotation": lambda: DartQuant(**dart, activation_bits=16, rotate="never"),
    }
    print(f"perplexity | fp32 | {perplexity(logits_of(prepared.exported['prefill']), evaluation):.3f}", flush=True)
    for name, make in methods.items():
        if wanted and not any(name.startswith(start) for start in wanted):
            continue
        logits, facts = quantized(prepared, make(), texts)
        print(f"perplexity | {name} | {perplexity(logits, evaluation):.3f} | {facts}", flush=True)


def cost(prepared: Prepared, texts: Tensor, evaluation: Tensor, steps: int) -> None:
    """Rotations alone: DartQuant's calibration and end-to-end learning from the same texts; seconds and peak memory.

    Peak memory is the process's high-water mark, so the cheaper one runs first.
    """
    held_out = stream_rows(prepared, evaluation, 4096, 1)
    base = _peak()
    started = time.perf_counter()
    method = DartQuant(lr=LR, group=64, rotate="always", weights="rtn")
    context = Context(prepared.exported, prepared.sites, {"prefill": calls(texts)}, {})
    plans = {site.place: method._plan(site) for site in prepared.sites["prefill"].linear}
    Rotations(method, context, "prefill", {place: plan for place, plan in plans.items() if not isinstance(plan, str)})
    seconds, after = time.perf_counter() - started, _peak()
    rotation = next(t for name, t in context.tensors.items() if name.endswith(".rotation"))
    error = rounding_error(held_out @ rotation, 4, 0.9)
    print(f"cost | DartQuant | {seconds:.1f} s | {(after - base) / 1e6:.0f} MB more | {error:.5f}", flush=True)
    model = QuantizedModel(prepared.exported["prefill"], prepared.sites["prefill"], 4, 0.9)
    generator = torch.Generator().manual_seed(0)
    start = random_hadamard(held_out.shape[-1], generator)
    heads = {
        node: random_hadamard(path.head_dim, generator).expand(path.kv_heads, -1, -1).clone()
        for node, path in model.paths.items()
    }
    learned, learned_heads, spent = learn(model, start, heads, texts, steps, lr=1.5)
    error = rounding_error(held_out @ learned, 4, 0.9)
    more = (_peak() - base) / 1e6
    print(f"cost | end to end, {steps} steps | {spent[-1]:.1f} s | {more:.0f} MB more | {error:.5f}", flush=True)
    for name, kind, given in (
        ("end to end", Given, [learned, *learned_heads.values()]),
        ("DartQuant", DartQuant, []),
    ):
        Given.given = given
        logits, _ = quantized(prepared, kind(lr=LR, group=64, rotate="always", weights="rtn"), texts)
        print(f"cost | W4A4 rtn, {name} | perplexity {perplexity(logits, evaluation):.3f}", flush=True)


def _peak() -> int:
    """The high-water mark of this process's memory, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def speed(layers: int | None, evaluation: Tensor, rounds: int) -> None:
    """W4A8 against the fp32 program, in turn, on one thread, in seconds of that thread; and what both weigh.

    Weights are rounded to nearest and nothing is measured at the sites, so that what runs does not depend on the load.
    """
    captured = gw.capture_causal_lm(load_smollm2(layers=layers), 1024, logits_to_keep=1)
    prepared = prepare(captured)
    method = DartQuant(activation_bits=8, group=64, rotate="never", weights="rtn")
    decisions = method.decide(Context(prepared.exported, prepared.sites))
    small = ("q", "k", "v", "o")
    large = [d for d in decisions if not (d.phase == "decode" and d.facts["role"] in small)]
    print_of = fingerprint(prepared.exported)
    programs = {
        "fp32": gw.optimize(captured),
        "W4A8": gw.optimize(captured, profile=gw.Profile(fingerprint=print_of, decisions=decisions)),
        "W4A8, decode of the MLP only": gw.optimize(
            captured, profile=gw.Profile(fingerprint=print_of, decisions=large)
        ),
    }
    tokens = evaluation[:1]

    def prefill(candidate: gw.Program) -> Callable[[], Any]:
        return lambda: (candidate.reset(), candidate(tokens, torch.arange(tokens.shape[1])))

    def decode(candidate: gw.Program) -> Callable[[], Any]:
        return lambda: candidate(tokens[:, :1], torch.tensor([tokens.shape[1]]))

    for name, run, count in (("prefill", prefill, rounds), ("decode", decode, 4 * rounds)):
        best = dict.fromkeys(programs, float("inf"))
        for _ in range(count + 1):
            for key, program in programs.items():
                started = time.thread_time()
                run(program)()
                best[key] = min(best[key], time.thread_time() - started)
        for key, seconds in best.items():
            print(f"speed | {name} | {key} | {seconds:.4f} s | {best['fp32'] / seconds:.2f}x", flush=True)
    for key, program in programs.items():
        print(f"speed | bytes | {key} | {program.weight_bytes()}", flush=True)
    packed = [d.site for d in decisions if d.phase == "prefill" and d.status == "proposed"]
    exported = programs["W4A8"].phases["prefill"].exported
    size = sum(t.nbytes for name, t in exported.state_dict.items() if ".int4." in name)
    before = sum(s.in_features * s.out_features * 4 for s in prepared.sites["prefill"].linear if s.id in packed)
    print(f"speed | decoder linears | {size} of {before} bytes: {size / before:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["errors", "perplexity", "cost", "speed"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--texts", type=int, default=8, help="windows of 512 tokens for calibration")
    parser.add_argument("--steps", type=int, default=8, help="steps of end-to-end learning")
    parser.add_argument("--only", nargs="*", default=[], help="settings of the perplexity, by their beginnings")
    options = parser.parse_args()
    texts, evaluation = windows("calibration", options.texts), windows("evaluation", options.windows)
    with one_thread():
        if options.parts != ["speed"]:
            prepared = setting(options.layers)
            if "errors" in options.parts:
                errors(prepared, texts, evaluation)
            if "perplexity" in options.parts:
                qualities(prepared, texts, evaluation, options.only)
            if "cost" in options.parts:
                cost(prepared, texts, evaluation, options.steps)
        if "speed" in options.parts:
            speed(options.layers, evaluation, rounds=5)


if __name__ == "__main__":
    main()
