"""SmolLM2-135M through one `optimize()` call: `python examples/smollm2.py --method int8`."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

import graphwright as gw
from graphwright.examples.compare_caches import compare_caches
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import perplexity, read_text, token_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="int8", help="a method's name, or 'none' for the canonical program")
    parser.add_argument("--layers", type=int, help="use only this many layers")
    parser.add_argument("--windows", type=int, default=2, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--save", help="write the program here (.gw)")
    options = parser.parse_args()

    model, tokenizer = load_smollm2(layers=options.layers), load_tokenizer()
    texts = token_windows(tokenizer, read_text("calibration"), 256, 2)
    captured = gw.capture_causal_lm(model, max_cache_len=1024)
    methods = [] if options.method == "none" else [options.method]
    program = gw.optimize(captured, methods=methods, calibration=texts)
    print(program.report())

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        program.reset()
        return program(tokens, torch.arange(tokens.shape[1]))

    windows = token_windows(tokenizer, read_text("evaluation"), 512, options.windows)
    cache = next((d for d in program.decisions if d.status == "kept" and d.pass_name == "quantize_cache"), None)
    if cache is not None:  # a prefill does not see what its cache becomes
        Console().print(compare_caches(program, gw.optimize(captured), windows, cache.options["mode"]))
    print(f"perplexity {perplexity(logits, windows):.3f}, weights {program.weight_bytes() / 1e6:.1f} MB")
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    print(tokenizer.decode(program.generate(prompt, 20, eos_token_id=tokenizer.eos_token_id)[0]))
    if options.save:
        program.save(options.save)


if __name__ == "__main__":
    main()
