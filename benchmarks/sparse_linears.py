"""Sparse linears on SmolLM2: quality and cost of Amber Pruner, Outstanding-sparse and LoSA against their baselines.

    python -m graphwright.benchmarks.sparse_linears amber frontier outstanding weights operator --windows 4

One part a run, each prints its lines as it goes: perplexity of whole windows (every position sparse, as it is scored),
and of the second half of each window behind a sparse prompt (the continuation is dense).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

import graphwright as gw
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.build import build
from graphwright.examples.continuation import continuation_perplexity
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import perplexity, read_text, token_windows
from graphwright.kernels.nm_sparsify import nm_sparsify
from graphwright.patterns.linear import LinearSite
from graphwright.prepare import Prepared, prepare, with_exact
from graphwright.profiles.amber import AmberPruner
from graphwright.profiles.losa import LoSA
from graphwright.profiles.method import Context
from graphwright.profiles.outstanding import OutstandingSparse
from graphwright.profiles.profile import fingerprint

SEVEN = ("q", "k", "v", "o", "gate", "up", "down")
WINDOW = 512


class RandomSkipping(AmberPruner):
    """Layers skipped by lot, as many as sensitivity would."""

    seed: ClassVar[int] = 0

    def _skipped(
        self,
        sites: Sequence[LinearSite],
        layers: Mapping[str, int],
        reasons: Mapping[str, str],
        errors: Mapping[str, float],
    ) -> tuple[int, ...]:
        count = len(super()._skipped(sites, layers, reasons, errors))
        generator = torch.Generator().manual_seed(self.seed)
        return tuple(torch.randperm(max(layers.values()), generator=generator)[:count].tolist())


class KnownSensitivity(AmberPruner):
    """Sensitivity that an earlier choice of the same pattern measured; where there is none, it is measured."""

    errors: ClassVar[dict[str, float]] = {}

    def _errors(self, context: Context, phase: str, sites: Sequence[LinearSite]) -> dict[str, float]:
        return self.errors or super()._errors(context, phase, sites)


class Setting:
    """The captured model, its canonical phases, and texts.

    Attributes:
        prepared: Canonical phases.
        texts, evaluation: Windows of tokens [n, 512].
        only, folder: Settings of LoSA to run, and where their runs are kept.
    """

    def __init__(self, layers: int | None, texts: int, windows: int) -> None:
        self.prepared = prepare(gw.capture_causal_lm(load_smollm2(layers=layers), WINDOW))
        tokenizer = load_tokenizer()
        self.texts = token_windows(tokenizer, read_text("calibration"), WINDOW, texts)
        self.evaluation = token_windows(tokenizer, read_text("evaluation"), WINDOW, windows)
        self.only: list[str] = []
        self.folder: Path | None = None

    def decide(self, method: gw.Method) -> tuple[gw.Program, dict[str, Any]]:
        """A program under a method, without measuring sites."""
        calls = [[text[None].contiguous(), torch.arange(WINDOW)] for text in self.texts]
        prepared = self.prepared
        context = Context(prepared.exported, prepared.sites, {"prefill": calls}, prepared.captured.facts)
        decisions = method.decide(context)
        return self.program(decisions, context.tensors), context.measured.get(method.name, {})

    def program(self, decisions: list[gw.Decision], tensors: Mapping[str, Tensor] | None = None) -> gw.Program:
        """A program of decisions."""
        prepared: Prepared = replace(self.prepared, shared={**self.prepared.shared, **(tensors or {})})
        changed = with_exact(prepared, decisions)
        made = build(changed, gw.Profile(fingerprint=fingerprint(self.prepared.exported), decisions=decisions))
        failed = [d for d in made.decisions if d.status == "failed"]
        assert not failed, failed[0]
        return made

    def line(self, name: str, program: gw.Program, about: str = "") -> tuple[float, float]:
        """Print both perplexities of a program."""
        whole, rest = (
            perplexity(whole_logits(program), self.evaluation),
            continuation_perplexity(program, self.evaluation),
        )
        print(f"{name} | whole window {whole:.3f} | continuation {rest:.3f} | {about}", flush=True)
        return whole, rest


def whole_logits(program: gw.Program) -> Callable[[Tensor], Tensor]:
    def logits(tokens: Tensor) -> Tensor:
        program.reset()
        return program(tokens, torch.arange(tokens.shape[1]))

    return logits


def amber(setting: Setting) -> None:
    """Patterns, scorings, policies."""
    setting.line("amber | dense", setting.program([]))
    everywhere = {"always": SEVEN, "selectively": (), "scoring": "none"}
    methods: dict[str, AmberPruner] = {
        "8:16": AmberPruner(),
        "4:8": AmberPruner(pattern=(4, 8)),
        "2:4": AmberPruner(pattern=(2, 4)),
        "16:32": AmberPruner(pattern=(16, 32)),
        "8:16, skipped by sites": AmberPruner(sensitivity="site"),
        "8:16, naive on all seven": AmberPruner(**everywhere),
        "2:4, naive on all seven": AmberPruner(pattern=(2, 4), **everywhere),
        "8:16, nothing skipped": AmberPruner(coverage=1.0),
        "8:16, robust_all": AmberPruner(scoring="robust_all"),
        "8:16, norm": AmberPruner(scoring="norm"),
        "8:16, none": AmberPruner(scoring="none"),
    }
    for name, method in methods.items():
        program, record = setting.decide(method)
        setting.line(f"amber | {name}", program, f"coverage {record['coverage']:.3f} | skip {record['skipped_layers']}")


def skipping(setting: Setting) -> None:
    """Sensitivity against five lots, at coverage 0.45, where more than a few layers are skipped."""
    for share in (0.55, 0.45):
        for kind in ("site", "output"):
            program, record = setting.decide(AmberPruner(coverage=share, sensitivity=kind))
            setting.line(f"skipping | {share} | by {kind}", program, f"skip {record['skipped_layers']}")
        for seed in range(5):
            RandomSkipping.seed = seed
            program, record = setting.decide(RandomSkipping(coverage=share))
            setting.line(f"skipping | {share} | lot {seed}", program, f"skip {record['skipped_layers']}")


def frontier(setting: Setting) -> None:
    """Coverage against perplexity; layers are skipped by the program's output, which is measured once a pattern."""
    for pattern in ((8, 16), (2, 4)):
        KnownSensitivity.errors = {}
        for share in (0.0, 0.35, 0.45, 0.5, 0.55, 1.0):
            program, record = setting.decide(KnownSensitivity(pattern=pattern, coverage=share))
            KnownSensitivity.errors = record["sensitivity"]
            about = f"coverage {record['coverage']:.3f} | {len(record['skipped_layers'])} layers skipped"
            setting.line(f"frontier | {pattern[0]}:{pattern[1]} | {share}", program, about)


def outstanding(setting: Setting) -> None:
    """Amber alone, then with int8; directions of the scale and sources of the factors."""
    setting.line("outstanding | dense", setting.program([]))
    for name, method in {
        "Amber 8:16": AmberPruner(),
        "widened (paper), int8 up to 0.02": OutstandingSparse(int8_error=0.02),
        "smoothed, alpha 0.5, int8 everywhere": OutstandingSparse(direction="smooth", alpha=0.5, int8_error=1.0),
        "widened, int8 everywhere": OutstandingSparse(int8_error=1.0),
        "widened, magnitudes, no int8": OutstandingSparse(scoring="none", int8_roles=()),
        "not scaled, magnitudes, no int8": OutstandingSparse(scoring="none", int8_roles=(), direction="none"),
    }.items():
        program, record = setting.decide(method)
        errors = sorted(record.get("int8", {"": 0.0}).values())
        middle, high = errors[len(errors) // 2] if errors else 0.0, errors[-3:]
        whole = sum(
            "quantize" in d.pass_name and d.status == "kept" and d.phase == "prefill" for d in program.decisions
        )
        about = f"{whole} int8 sites, error {middle:.4f}, worst {[round(e, 3) for e in high]}"
        setting.line(f"outstanding | {name}", program, about)


def decode(setting: Setting) -> None:
    """Time of a decode step and of a prefill with compressed weights, against dense ones; one-shot Wanda, 60% zeros."""
    tokens = setting.evaluation[:1]
    method = LoSA(steps=1, train_steps=0, rates="uniform", samples=4)
    sparse, record = setting.decide(method)
    programs = {"dense": setting.program([]), "compressed": sparse}
    for name, call in {
        "decode": lambda p: p(tokens[:, :1], torch.tensor([tokens.shape[1] - 1])),
        "prefill": lambda p: (p.reset(), p(tokens, torch.arange(tokens.shape[1]))),
    }.items():
        best = interleaved({key: (lambda p=p, call=call: call(p)) for key, p in programs.items()}, rounds=8)
        share = best["dense"] / best["compressed"]
        print(f"decode | {name} | {best['dense']:.4f} s dense, {best['compressed']:.4f} s: {share:.2f}x", flush=True)
    sizes = {key: program.weight_bytes() for key, program in programs.items()}
    print(f"decode | bytes | {sizes} | {sizes['compressed'] / sizes['dense']:.4f} | zeros {record['zeros']:.4f}")


def operator(setting: Setting) -> None:
    """The selection beside the linear that it feeds, 512 tokens."""
    for k, n in ((576, 576), (576, 1536), (1536, 576)):
        x, weight, factors = torch.randn(1, WINDOW, k), torch.randn(n, k), torch.rand(k) + 1
        for pattern in ((2, 4), (4, 8), (8, 16), (16, 32)):
            best = interleaved(
                {
                    "linear": lambda x=x, weight=weight: functional.linear(x, weight),
                    "select": lambda x=x, f=factors, p=pattern: nm_sparsify(x, f, *p),
                },
                rounds=40,
            )
            share = best["select"] / best["linear"]
            print(
                f"operator | {k} -> {n} | {pattern[0]}:{pattern[1]} | {best['select'] * 1e6:.0f} us of "
                f"{best['linear'] * 1e6:.0f} us: {share:.3f}",
                flush=True,
            )


def losa_methods() -> dict[str, LoSA]:
    """Settings that are compared, each with as many updates in all."""
    plain = {"samples": 16, "lr": 1e-3, "checkpointing": False}
    return {
        "wanda60": LoSA(steps=1, train_steps=0, rates="uniform", samples=16),
        "losa60": LoSA(train_steps=40, **plain),
        "losa60two": LoSA(steps=2, train_steps=100, **plain),
        "oneshot60": LoSA(steps=1, train_steps=200, rates="uniform", ranks="uniform", rank=(8, 8), **plain),
        "unmasked60": LoSA(
            steps=1, train_steps=200, rates="uniform", ranks="uniform", rank=(8, 8), masked=False, **plain
        ),
        "wanda50": LoSA(sparsity=0.5, steps=1, train_steps=0, rates="uniform", samples=16),
        "losa50": LoSA(sparsity=0.5, train_steps=40, **plain),
        "sparsegpt60": LoSA(steps=1, train_steps=0, rates="uniform", samples=16, pruner="sparsegpt"),
        "wanda816": LoSA(pattern=(8, 16), steps=1, train_steps=0, samples=16),
        "wanda24": LoSA(pattern=(2, 4), steps=1, train_steps=0, samples=16),
        "wanda816few": LoSA(pattern=(8, 16), steps=1, train_steps=0, samples=16, roles=("q", "gate", "down")),
        "wanda24few": LoSA(pattern=(2, 4), steps=1, train_steps=0, samples=16, roles=("q", "gate", "down")),
        "losa24": LoSA(pattern=(2, 4), train_steps=40, **plain),
        "uniform60": LoSA(steps=1, train_steps=0, rates="uniform", samples=16),
        "similarity60": LoSA(steps=1, train_steps=0, samples=16),
        "reversed60": LoSA(steps=1, train_steps=0, rates="reversed", samples=16),
    }


def losa(setting: Setting) -> None:
    """LoSA against its baselines; a run that is interrupted goes on where it was, if --folder is given."""
    texts = token_windows(load_tokenizer(), read_text("calibration"), LOSA_WINDOW)
    calls = [[text[None].contiguous(), torch.arange(LOSA_WINDOW)] for text in texts]
    prepared = setting.prepared
    for name, method in losa_methods().items():
        if setting.only and name not in setting.only:
            continue
        folder = None if setting.folder is None else setting.folder / name
        method = method.model_copy(update={"folder": folder, "save_every": 20})
        started = time.perf_counter()
        context = Context(prepared.exported, prepared.sites, {"prefill": calls}, prepared.captured.facts)
        decisions = method.decide(context)
        record = context.measured["losa"]
        seconds = sum(s["prune_seconds"] + s.get("train_seconds", 0) for s in record["steps"])
        about = f"{record['zeros']:.4f} zeros | {seconds:.0f} s in all, {time.perf_counter() - started:.0f} s now"
        program = setting.program(decisions, context.tensors)
        setting.line(f"losa | {name}", program, about)
        last = record["steps"][-1]
        print(f"  rates {[round(r, 3) for r in last['rates']]}\n  ranks {last['ranks']}", flush=True)


LOSA_WINDOW = 256
"""Tokens of a text that is trained on: short, for more updates of the few texts that ship here."""

PARTS: dict[str, Callable[[Setting], None]] = {
    "amber": amber,
    "skipping": skipping,
    "frontier": frontier,
    "outstanding": outstanding,
    "losa": losa,
    "decode": decode,
    "operator": operator,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--texts", type=int, default=4, help="windows of 512 tokens for calibration")
    parser.add_argument("--only", nargs="*", default=[], help="settings of losa, by name")
    parser.add_argument("--folder", type=Path, help="where losa keeps its runs, to go on from")
    options = parser.parse_args()
    started = time.perf_counter()
    with one_thread():
        setting = Setting(options.layers, options.texts, options.windows)
        setting.only, setting.folder = options.only, options.folder
        for part in options.parts:
            PARTS[part](setting)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
