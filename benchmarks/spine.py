"""SmolLM2-135M through the whole pipeline, and the int8 linear alone: each function measures one row of the table."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.timing import interleaved
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import divergence, log_probabilities, read_text, token_windows
from graphwright.kernels.int8_linear import quantize_per_channel

CACHE = 1024
LAYERS = 30
SMOOTH = 0.65
"""Share of a channel's size that moves into the weight: the best of four on this model's calibration text. With all 211
linears in int8 the divergence is 0.040 nats a token with none moved, and 0.034, 0.024, 0.022, 0.033 with 0.3, 0.5, 0.65
and 0.8."""


def sites(program: gw.Program) -> dict[str, Any]:
    """What was matched in each phase, and what was proved."""
    return {
        phase: {
            "attention": len(found.attention),
            "grouped": sum(site.heads != site.kv_heads for site in found.attention),
            "masks": sorted({site.mask.kind for site in found.attention}),
            "linear": len(found.linear),
            "norm": len(found.norm),
            "cache": len(found.cache),
        }
        for phase, found in program.sites.items()
    }


def canonical_against_eager(model: Any, program: gw.Program, tokens: Tensor, rounds: int) -> dict[str, Any]:
    """Largest difference and speed of the canonical program against the model, prefill and decode.

    The program fills a static cache of 1024 positions, and so does the model; beside it the model without any cache.
    """
    from transformers import StaticCache

    length = tokens.shape[1]
    position = torch.arange(length)
    program.reset()
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        difference = float((program(tokens, position) - expected).abs().max() / expected.abs().max())

        cache = StaticCache(config=model.config, max_cache_len=CACHE)
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
        filled = torch.tensor(length)

        def eager_decode() -> Any:
            for layer in cache.layers:
                layer.cumulative_length.copy_(filled)  # pyright: ignore[reportAttributeAccessIssue]
            return model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True).logits

        def eager_prefill() -> Any:
            for layer in cache.layers:
                layer.cumulative_length.zero_()  # pyright: ignore[reportAttributeAccessIssue]
            return model(input_ids=tokens, past_key_values=cache, use_cache=True)

        step = torch.tensor([length])
        expected = eager_decode()
        decode = float((program(tokens[:, :1], step) - expected).abs().max() / expected.abs().max())
        prefill_time = interleaved(
            {
                "eager": eager_prefill,
                "eager without a cache": lambda: model(input_ids=tokens, use_cache=False),
                "canonical": lambda: program(tokens, position),
            },
            rounds,
        )
        decode_time = interleaved(
            {"eager": eager_decode, "canonical": lambda: program(tokens[:, :1], step)}, rounds * 3
        )
    return {
        "prefill_difference": difference,
        "decode_difference": decode,
        "prefill_seconds": prefill_time,
        "decode_seconds": decode_time,
        "prefill_speedup": prefill_time["eager"] / prefill_time["canonical"],
        "prefill_without_cache_speedup": prefill_time["eager without a cache"] / prefill_time["canonical"],
        "decode_speedup": decode_time["eager"] / decode_time["canonical"],
    }


def int8_against_fp32(canonical: gw.Program, quantized: gw.Program, tokens: Tensor, rounds: int) -> dict[str, Any]:
    """Speed of prefill and decode."""
    position, step = torch.arange(tokens.shape[1]), torch.tensor([tokens.shape[1]])
    prefill = interleaved(
        {"fp32": lambda: canonical(tokens, position), "int8": lambda: quantized(tokens, position)}, rounds
    )
    decode = interleaved(
        {"fp32": lambda: canonical(tokens[:, :1], step), "int8": lambda: quantized(tokens[:, :1], step)}, rounds * 3
    )
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "prefill_speedup": prefill["fp32"] / prefill["int8"],
        "decode_speedup": decode["fp32"] / decode["int8"],
    }


def logits_of(program: gw.Program) -> Callable[[Tensor], Tensor]:
    """A program's prefill as a function of tokens [1, S]."""

    def run(tokens: Tensor) -> Tensor:
        program.reset()
        return program(tokens, torch.arange(tokens.shape[1]))

    return run


def budgeted_int8(
    captured: gw.Captured, canonical: gw.Program, texts: Tensor, held_out: Tensor, *, largest: float, probes: int
) -> gw.Program:
    """Int8 whose output distribution stays within a divergence of the canonical program's.

    Args:
        captured: What is to be optimized.
        canonical: The reference.
        texts: Tokens [n, S] to calibrate on.
        held_out: Other tokens [n, S], to hold the budget on.
        largest: Largest mean divergence, nats a token.
        probes: Sites that are tried alone.
    """
    reference = log_probabilities(logits_of(canonical), held_out)

    def quality(program: gw.Program) -> float:
        return -divergence(logits_of(program), held_out, reference)

    budget = gw.Budget(evaluate=quality, max_drop=largest, probes=probes)
    return gw.optimize(captured, methods=[gw.Int8(smooth=SMOOTH)], calibration=texts, budget=budget)


def same_sites(captured: gw.Captured, program: gw.Program, texts: Tensor) -> gw.Program:
    """Another capture of the same model with int8 at the places where a program kept it."""
    kept = {d.place for d in program.decisions if d.status == "kept"}
    skip = tuple({d.place.rsplit("/", 1)[0] for d in program.decisions if d.place not in kept})
    method = gw.Int8(smooth=SMOOTH, skip=skip)
    return gw.optimize(captured, methods=[method], calibration=texts)


def int8_linear(rounds: int) -> list[dict[str, Any]]:
    """The kernel alone against fp32 and bf16 linears."""
    rows = []
    linear, ours = torch.nn.functional.linear, torch.ops.graphwright.int8_linear
    for m, k, n in ((512, 576, 1536), (2048, 2048, 2048), (1, 576, 1536)):
        x, w = torch.randn(m, k), torch.randn(n, k)
        xb, wb = x.bfloat16(), w.bfloat16()
        values, scale = quantize_per_channel(w)
        best = interleaved(
            {
                "fp32": lambda x=x, w=w: linear(x, w),
                "bf16": lambda x=xb, w=wb: linear(x, w),
                "int8": lambda x=x, v=values, s=scale: ours(x, v, s),
            },
            rounds * (4 if m < 2048 else 1),
        )
        rows.append(
            {
                "shape": f"({m}, {k}) x ({k}, {n})",
                "seconds": best,
                "over_fp32": best["fp32"] / best["int8"],
                "over_bf16": best["bf16"] / best["int8"],
            }
        )
    return rows


_GROWTH = """
import json, resource, sys, threading, time
import torch
torch.set_num_threads({threads})
import graphwright as gw
from graphwright.examples.load_smollm2 import load_smollm2
model = load_smollm2(layers={layers})
weights = sum({{p.data_ptr(): p.numel() * 4 for p in model.parameters()}}.values())

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()

peak, done = resident(), False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.01)
before = resident()
thread = threading.Thread(target=watch); thread.start()
started = time.perf_counter()
captured = gw.capture_causal_lm(model, 512)
captured_at = time.perf_counter()
program = gw.optimize(captured, methods=[gw.Int8()], progress=False)
seconds = time.perf_counter() - started
done = True; thread.join()
kept = sum(d.status == 'kept' for d in program.decisions)
print(json.dumps(dict(layers={layers}, seconds=seconds, capture_seconds=captured_at - started, weight_bytes=weights,
                      peak_bytes=peak, over_weights=peak / weights,
                      beyond_loaded=(peak - before + weights) / weights, kept=kept)))
"""


def growth(layers: tuple[int, ...] = (4, 8, 16, LAYERS)) -> list[dict[str, Any]]:
    """Seconds and peak memory of optimize() by number of layers, each in its own process."""
    rows = []
    for count in layers:
        code = _GROWTH.format(layers=count, threads=2)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def round_trip(program: gw.Program, tokens: Tensor) -> dict[str, Any]:
    """Save, load, and compare bit for bit."""
    import time

    position = torch.arange(tokens.shape[1])
    program.reset()
    expected = [program(tokens, position), program(tokens[:, :1], torch.tensor([tokens.shape[1]]))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.gw"
        started = time.perf_counter()
        program.save(path)
        saved = time.perf_counter()
        loaded = gw.load(path)
        seconds = time.perf_counter() - saved
        got = [loaded(tokens, position), loaded(tokens[:, :1], torch.tensor([tokens.shape[1]]))]
        size = path.stat().st_size
    return {
        "bit_equal": all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)),
        "file_over_weights": size / program.weight_bytes(),
        "save_seconds": saved - started,
        "load_seconds": seconds,
    }


def import_seconds(rounds: int = 5) -> float:
    """Seconds that `import graphwright` adds to `import torch`, least of several processes."""
    code = "import time, torch; t = time.perf_counter(); import graphwright; print(time.perf_counter() - t)"
    return min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    )


def setting(layers: int | None = None) -> tuple[Any, gw.Captured, Tensor, Tensor]:
    """Model, captured program, calibration windows of 256 tokens, evaluation windows of 512."""
    model, tokenizer = load_smollm2(layers=layers), load_tokenizer()
    calibration = token_windows(tokenizer, read_text("calibration"), 256, 8)
    evaluation = token_windows(tokenizer, read_text("evaluation"), 512, 8)
    return model, gw.capture_causal_lm(model, CACHE), calibration, evaluation
