"""SmolLM2-135M through one `optimize()` call: `python examples/smollm2.py --method int8`.

--method dartquant       4-bit weights and activations behind calibrated rotations, on more calibration text
--method dartquant-a8    4-bit weights, 8-bit activations
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console

import graphwright as gw
from graphwright.examples.compare_caches import compare_caches
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import perplexity, read_text, token_windows

CHOICES = {
    # The published learning rate is 1e-3; this width takes 1e-2 better (docs/dartquant.md).
    "dartquant": gw.DartQuant(lr=1e-2, rotate="always"),
    "dartquant-a8": gw.DartQuant(lr=1e-2, activation_bits=8),
}
"""Methods with settings for this model; any other name is taken with its defaults."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="int8", help="a method's name, or 'none' for the canonical program")
    parser.add_argument("--layers", type=int, help="use only this many layers")
    parser.add_argument("--windows", type=int, default=2, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--save", help="write the program here (.gw)")
    options = parser.parse_args()

    model, tokenizer = load_smollm2(layers=options.layers), load_tokenizer()
    captured = gw.capture_causal_lm(model, max_cache_len=1024)
    methods = [] if options.method == "none" else [CHOICES.get(options.method, options.method)]
    rotates = options.method in CHOICES
    texts = token_windows(tokenizer, read_text("calibration"), 512 if rotates else 256, 32 if rotates else 2)
    # Without integer instructions of 4 bits, A4 is for its quality: it is kept where it is not faster, too.
    keep = "smaller" if rotates else "faster"
    program = gw.optimize(captured, methods=methods, calibration=[texts] if rotates else texts, keep=keep)
    print(program.report())

    def logits_of(candidate: gw.Program) -> Callable[[torch.Tensor], torch.Tensor]:
        def logits(tokens: torch.Tensor) -> torch.Tensor:
            candidate.reset()
            return candidate(tokens, torch.arange(tokens.shape[1]))

        return logits

    windows = token_windows(tokenizer, read_text("evaluation"), 512, options.windows)
    canonical = gw.optimize(captured)
    for name, each in {"canonical": canonical, options.method: program}.items():
        seconds = each.time(windows[:1], torch.arange(512))
        size = f"{each.weight_bytes() / 1e6:.1f} MB"
        print(f"{name}: perplexity {perplexity(logits_of(each), windows):.3f}, weights {size}, prefill {seconds:.3f} s")
    cache = next((d for d in program.decisions if d.status == "kept" and d.pass_name == "quantize_cache"), None)
    if cache is not None:  # a prefill does not see what its cache becomes
        Console().print(compare_caches(program, canonical, windows, cache.options["mode"]))
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    print(tokenizer.decode(program.generate(prompt, 20, eos_token_id=tokenizer.eos_token_id)[0]))
    if options.save:
        program.save(options.save)


if __name__ == "__main__":
    main()
