"""What `make demo` runs: SmolLM2-135M before and after Int8, with its quality, bytes and speed beside each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.spine import budgeted_int8, logits_of
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import perplexity, read_text, token_windows
from graphwright.inspection.tables import Table

QUESTION = "Explain in two sentences why the sky is blue."
ANSWER_TOKENS = 40


def run_demo(console: Console, *, layers: int | None = None, windows: int = 4, page: Path | None = None) -> None:
    """Optimize, report, generate, measure; on one thread, so that a busy neighbour does not decide the figures.

    Args:
        console: Where to print.
        layers: Use only this many layers of the model.
        windows: Windows of 512 tokens for the perplexity.
        page: Where to write the page of the result; its folder is made.
    """
    with one_thread():
        _demo(console, layers, windows, page)


def _demo(console: Console, layers: int | None, windows: int, page: Path | None) -> None:
    started = time.perf_counter()
    console.rule("SmolLM2-135M-Instruct, dynamic int8")
    with console.status("loading the model"):
        model, tokenizer = load_smollm2(layers=layers), load_tokenizer()
        calibration = token_windows(tokenizer, read_text("calibration"), 256, 6)
        evaluation = token_windows(tokenizer, read_text("evaluation"), 512, windows)
        prompt = _prompt(tokenizer)
    with console.status("capturing: torch.export, then the canonical dialect"):
        captured = gw.capture_causal_lm(model, max_cache_len=1024)
        before = gw.optimize(captured)
        del model

    with console.status("searching: which linears bear int8"):
        after = budgeted_int8(captured, before, calibration[3:], calibration[:3], largest=0.008, probes=210)
    console.print(after.report())

    table = Table("", "before", "after", "", title="measured in this run, one thread", title_justify="left")
    rows = _measure(console, before, after, prompt, evaluation)
    for name, low, high, note in rows:
        table.add_row(name, low, high, note)
        if name != "weights":  # the page has these of its own
            after.note(name, low, high, note)
    console.print(table)
    for name, program in (("before", before), ("after", after)):
        tokens = program.generate(prompt, ANSWER_TOKENS, eos_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
        console.print(f"[bold]{name}[/bold]: {QUESTION} {text.strip()}")
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    if page is not None:
        after.facts = {**after.facts, "name": "SmolLM2-135M-Instruct in int8"}
        page.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"The page with graphs, decisions and pictures: {after.html(page).resolve()}", soft_wrap=True)


def _prompt(tokenizer: Any) -> Tensor:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    return torch.tensor([tokenizer(text)["input_ids"]])


def _measure(
    console: Console, before: gw.Program, after: gw.Program, prompt: Tensor, evaluation: Tensor
) -> list[tuple[str, str, str, str]]:
    with console.status("measuring perplexity"):
        low, high = (perplexity(logits_of(program), evaluation) for program in (before, after))
    size, small = before.weight_bytes() / 1e6, after.weight_bytes() / 1e6
    rows = [
        ("perplexity", f"{low:.2f}", f"{high:.2f}", f"{high / low - 1:+.2%}"),
        ("weights", f"{size:.0f} MB", f"{small:.0f} MB", f"{size / small:.2f}x smaller"),
    ]
    text = evaluation[:1]
    position, step = torch.arange(text.shape[1]), torch.tensor([prompt.shape[1]])
    with console.status("measuring speed"):
        prefill = _in_turn(lambda p: p(text, position), before, after, 3)
        decode = _in_turn(lambda p: p(text[:, :1], step), before, after, 8)
    for name, tokens, times in (("prefill of 512 tokens", text.shape[1], prefill), ("decode", 1, decode)):
        first, second = times
        rows.append(
            (name, f"{tokens / first:.1f} tokens/s", f"{tokens / second:.1f} tokens/s", _speed_up(first / second))
        )
    return rows


def _speed_up(ratio: float) -> str:
    if abs(ratio - 1) < 0.01:
        return "as fast"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def _in_turn(run: Any, before: gw.Program, after: gw.Program, rounds: int) -> tuple[float, float]:
    best = interleaved({"before": lambda: run(before), "after": lambda: run(after)}, rounds)
    return best["before"], best["after"]
