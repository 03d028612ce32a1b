"""SmolLM2-135M through one `optimize()` call: `python examples/smollm2.py --method int8`.

--method dartquant       4-bit weights and activations behind calibrated rotations, on more calibration text
--method dartquant-a8    4-bit weights, 8-bit activations
--method amber           8:16 sparse activations in prefill: saves arithmetic, no time here
--method outstanding     the same with int8 linears
--method losa            60% of the weights zero, recovered by adapters that are trained --train-steps times in each of
                         5 steps; goes on where it was if --folder names the folder of an earlier run
--method kvtuner         a cache of 4 bits on average, searched for on calibration text
--method razor           the whole cache for a quarter of the heads, with settings for short contexts
--method freekv          a budget of 2048 tokens of the cache in memory, all of it on disk; with --context 8192 and more
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

import graphwright as gw
from graphwright.benchmarks.passkey import found, hide
from graphwright.examples.compare_caches import block_of, compare_caches
from graphwright.examples.compare_linears import compare_linears
from graphwright.examples.compare_offload import WRITTEN, compare_offload
from graphwright.examples.compare_sparse import compare_sparse
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import perplexity, read_text, token_windows
from graphwright.profiles.razor import SHORT_CONTEXT

CHOICES = {
    # The published learning rate is 1e-3; this width takes 1e-2 better (docs/dartquant.md).
    "dartquant": gw.DartQuant(lr=1e-2, rotate="always"),
    "dartquant-a8": gw.DartQuant(lr=1e-2, activation_bits=8, weights="gptaq"),
    "amber": gw.AmberPruner(),
    "outstanding": gw.OutstandingSparse(),
    # The published rate is for thousands of rows; these few texts take a larger one (docs/sparse-linears.md).
    "losa": gw.LoSA(lr=1e-3, samples=16, checkpointing=False),
    "razor": gw.RazorAttention(**SHORT_CONTEXT),
    "freekv": gw.FreeKV(),
}
"""Methods with settings for this model; any other name is taken with its defaults."""
CACHE = 1024
"""Tokens that are captured, unless --context says how many."""
WINDOWS = {"amber": (512, 2), "outstanding": (512, 2), "losa": (256, None), "freekv": (64, 1)}
"""Tokens of a window and how many of them, for calibration; None takes all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="int8", help="a method's name, or 'none' for the canonical program")
    parser.add_argument("--layers", type=int, help="use only this many layers")
    parser.add_argument("--context", type=int, default=CACHE, help="tokens that the cache holds")
    parser.add_argument("--windows", type=int, default=2, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--save", help="write the program here (.gw)")
    parser.add_argument("--train-steps", type=int, default=40, help="updates in each step of losa")
    parser.add_argument("--folder", type=Path, help="where losa keeps its run")
    options = parser.parse_args()

    model, tokenizer = load_smollm2(layers=options.layers), load_tokenizer()
    captured = gw.capture_causal_lm(model, max_cache_len=options.context)
    methods = [] if options.method == "none" else [CHOICES.get(options.method, options.method)]
    if options.method == "losa":
        changes = {"train_steps": options.train_steps, "folder": options.folder}
        methods = [CHOICES["losa"].model_copy(update=changes)]
    known = options.method in CHOICES
    window, count = WINDOWS.get(options.method, (512, 32) if known else (256, 2))
    texts = token_windows(tokenizer, read_text("calibration"), window, count)
    # What has no hardware here, 4-bit integers and sparse products, is for its quality: it is kept where it is not
    # faster, too.
    keep = "smaller" if known else "faster"
    started = time.perf_counter()
    program = gw.optimize(captured, methods=methods, calibration=[texts] if known else texts, keep=keep)
    seconds = time.perf_counter() - started
    print(program.report())

    def logits_of(candidate: gw.Program) -> Callable[[torch.Tensor], torch.Tensor]:
        def logits(tokens: torch.Tensor) -> torch.Tensor:
            candidate.reset()
            return candidate(tokens, torch.arange(tokens.shape[1]))

        return logits

    windows = token_windows(tokenizer, read_text("evaluation"), 512, options.windows)
    canonical = gw.optimize(captured)
    for name, each in {"canonical": canonical, options.method: program}.items():
        prefill = each.time(windows[:1], torch.arange(512))
        size = f"{each.weight_bytes() / 1e6:.1f} MB"
        print(f"{name}: perplexity {perplexity(logits_of(each), windows):.3f}, weights {size}, prefill {prefill:.3f} s")
    if isinstance(methods[0] if methods else None, gw.DartQuant):
        Console().print(compare_linears(program, canonical, captured, windows, logits_of, seconds))
    if options.method in WINDOWS:  # a sparse prompt costs more where it is scored itself
        Console().print(compare_sparse(program, canonical, windows, logits_of, seconds))
    of_cache = ("quantize_cache", "split_cache_heads")
    cache = next((d for d in program.decisions if d.status == "kept" and d.pass_name in of_cache), None)
    if cache is not None:  # a prefill does not see what its cache becomes
        Console().print(compare_caches(program, canonical, windows, block_of(cache)))
    if options.method == "freekv":
        text = token_windows(tokenizer, read_text("evaluation"), options.context - WRITTEN, 1)
        Console().print(compare_offload(program, canonical, tokenizer, text))
    if options.method == "razor":
        texts = list(hide(tokenizer, read_text("evaluation"), options.context, (0.0, 0.25, 0.5, 0.75, 1.0)))
        for name, each in {"full cache": canonical, "razor": program}.items():
            print(
                f"{name}: finds {found(each, texts)[0]:.0%} of {len(texts)} numbers hidden in {options.context} tokens"
            )
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    print(tokenizer.decode(program.generate(prompt, 20, eos_token_id=tokenizer.eos_token_id)[0]))
    if options.save:
        program.save(options.save)


if __name__ == "__main__":
    main()
