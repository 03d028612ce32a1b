"""FreeKV on SmolLM2: quality against the full cache, and time and bytes against retrieval that blocks.

    python -m graphwright.benchmarks.freekv exact --length 4096
    python -m graphwright.benchmarks.freekv quality --length 4096 --texts 2
    python -m graphwright.benchmarks.freekv passkey --length 4096 --draws 2
    python -m graphwright.benchmarks.freekv blocking --length 4096 --bandwidth 100
    python -m graphwright.benchmarks.freekv layout --bandwidth 100
    python -m graphwright.benchmarks.freekv memory
    python -m graphwright.benchmarks.freekv soak --steps 2000

Each prints its lines as it goes. Retrieval that blocks is FreeKV with a threshold above 1: every head chooses and
fetches before its attention, as in Quest. Quality is that of programs with `offload=False`, which compute what an
offloaded cache gives (`exact` shows that they do) for many tokens in a call.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.passkey import Hidden, answered, asked_before, hide, shares
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import read_text, token_windows
from graphwright.kernels.page_tables import Plan
from graphwright.kernels.slow_pool import FilePool, SlowFile, bytes_of, open_pools
from graphwright.profiles.decode_loss import decode_loss

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TAUS = {"no correction": None, "tau 0.8": 0.8, "tau 0.9": 0.9, "always": 2.0}
RUN = 8
"""Tokens that a program decodes before the next one has its turn."""
PIECE = 1024
"""Tokens of a text that are read at a time: their logits are in memory together."""


class Study:
    """One model, captured for texts of one length, and a budget of a quarter of it."""

    def __init__(self, layers: int | None, length: int, last: int = 0) -> None:
        self.length, self.budget = length, length // 4
        model = load_smollm2(layers=layers)
        self.captured = gw.capture_causal_lm(model, max_cache_len=length, logits_to_keep=last)
        self.canonical = gw.optimize(self.captured, progress=False)

    def program(self, **options: Any) -> gw.Program:
        """What FreeKV makes with these options."""
        method = gw.FreeKV(**{"budget": self.budget} | options)
        return gw.optimize(self.captured, methods=[method], progress=False)

    def text(self, count: int = 1) -> Tensor:
        """Tokens [count, length] of the evaluation articles."""
        return token_windows(load_tokenizer(), read_text("evaluation"), self.length, count)


def read(program: gw.Program, tokens: Tensor) -> Tensor:
    """Logits of the last token of a text, which is read at once from an empty cache."""
    program.reset()
    return program(tokens, torch.arange(tokens.shape[1]))[:, -1:]


def exact(study: Study, steps: int) -> None:
    """Decoded logits against the full cache where all fits, and tokens against the oracle at every tau."""
    text = study.text()
    prompt = text[:, : study.length - steps]
    programs = {"full cache": study.canonical, "budget of the context": study.program(budget=study.length)}
    logits = {name: decode(program, text, steps) for name, program in programs.items()}
    most = float((logits["full cache"] - logits["budget of the context"]).abs().max())
    print(f"exact | budget of the context, {steps} tokens | largest difference of logits {most:.1e}", flush=True)
    for name, tau in TAUS.items():
        system, oracle = (study.program(tau=tau, offload=offload) for offload in (True, False))
        same = greedy(system, prompt, steps) == greedy(oracle, prompt, steps)
        print(f"exact | {name} | {steps} tokens equal to the oracle: {same}", flush=True)


def decode(program: gw.Program, text: Tensor, steps: int) -> Tensor:
    """Logits [1, steps, V] of a text's last tokens, decoded one by one."""
    first = text.shape[1] - steps
    read(program, text[:, :first])
    return torch.cat([program(text[:, i : i + 1], torch.tensor([i])) for i in range(first, text.shape[1])], 1)


def greedy(program: gw.Program, prompt: Tensor, steps: int) -> list[int]:
    """The tokens that a program continues with."""
    tokens = [int(read(program, prompt)[:, -1].argmax())]
    for i in range(prompt.shape[1], prompt.shape[1] + steps - 1):
        tokens.append(int(program(torch.tensor([tokens[-1:]]), torch.tensor([i]))[:, -1].argmax()))
    return tokens


def quality(study: Study, texts: int) -> None:
    """Perplexity of decoding whole windows."""
    windows = list(study.text(texts).split(1))
    full = decode_loss(study.canonical, windows, PIECE)
    print(f"quality | full cache | perplexity {math.exp(full):.4f}", flush=True)
    candidates: dict[str, dict[str, Any]] = {name: {"tau": tau} for name, tau in TAUS.items()}
    candidates |= {f"always, {pooling}": {"tau": 2.0, "pooling": pooling} for pooling in ("max_softmax", "mean_score")}
    candidates["always, scaled"] = {"tau": 2.0, "scaled": True}
    for name, options in candidates.items():
        loss = decode_loss(study.program(offload=False, **options), windows, PIECE)
        share = math.exp(loss - full) - 1
        print(f"quality | {name} | perplexity {math.exp(loss):.4f} | {share:+.3%}", flush=True)


def passkey(study: Study, draws: int, ask: str) -> None:
    """Numbers found in texts that fill the cache: asked for "after" the text was read, or "before" it ends.

    A prefill attends to everything, so with the question in it, as in the paper's tasks, only the answer is retrieved.
    """
    tokenizer, prose = load_tokenizer(), read_text("evaluation")
    texts: list[Hidden] = [t for seed in range(draws) for t in hide(tokenizer, prose, study.length, DEPTHS, seed)]
    before = ask == "before"
    texts = [asked_before(text) for text in texts] if before else texts
    programs = {name: study.program(tau=tau, offload=False) for name, tau in TAUS.items()}
    right: dict[str, list[list[bool]]] = {name: [] for name in ("full cache", *programs)}
    for text in texts:
        read(study.canonical, text.text)
        full = {name: tensor.clone() for name, tensor in study.canonical._state().items()}
        right["full cache"].append(answered(study.canonical, text, by_token=before))
        for name, program in programs.items():
            program.reset()  # a prefill attends to everything, so the text is read once for all
            for buffer, tensor in program._state().items():
                if buffer in full:
                    tensor.copy_(full[buffer])
            right[name].append(answered(program, text, by_token=before))
    for name, each in right.items():
        numbers, digits = shares(each)
        print(f"passkey | {name} | {numbers:.0%} of {len(texts)} numbers | {digits:.0%} of digits", flush=True)


class Tier:
    """A slow memory of a stated bandwidth: whoever reads waits as long as a device of it would take, one at a time.

    Args:
        bandwidth: Megabytes a second; 0 for as fast as it is.
    """

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self._free, self._lock = bandwidth * 1e6, 0.0, threading.Lock()

    @contextmanager
    def of(self, file: SlowFile | None) -> Iterator[None]:
        """Let a file be on it, where there is one."""
        if file is None or not self.bandwidth:
            yield
            return
        read = file.read

        def slowly(view: memoryview, offset: int) -> None:
            read(view, offset)
            with self._lock:
                self._free = max(self._free, time.perf_counter()) + len(view) / self.bandwidth
                until = self._free
            # Shorter waits than the system's sleep can do add up to one that it can.
            if (left := until - time.perf_counter()) > 1e-3:
                time.sleep(left)

        file.read = slowly
        try:
            yield
        finally:
            file.read = read


def blocking(study: Study, steps: int, bandwidth: float) -> None:
    """Time, stalls and bytes a token, the programs in turn on runs of the same tokens."""
    text = study.text()
    first = text.shape[1] - steps
    programs = {"full cache": study.canonical}
    programs |= {name: study.program(tau=tau) for name, tau in (TAUS | {"tau 0.6": 0.6}).items() if tau != 0.9}
    spent: dict[str, list[float]] = {name: [] for name in programs}
    before: dict[str, dict[str, float]] = {}
    for name, program in programs.items():
        read(program, text[:, :first])
        before[name] = program.offload_figures()
    for low in range(first, text.shape[1], RUN):
        for name, program in programs.items():
            pools = program._offload._pools
            with Tier(bandwidth if pools else 0).of(pools[0].file if pools else None):
                started = time.perf_counter()
                for i in range(low, min(low + RUN, text.shape[1])):
                    program(text[:, i : i + 1], torch.tensor([i]))
                program.offload_figures()  # what is fetched for this program must not slow the next one down
                spent[name].append((time.perf_counter() - started) / RUN)
    for name, program in programs.items():
        times = sorted(spent[name])
        said = f"runs of {RUN} tokens: least {times[0] * 1e3:.1f} ms a token, median {times[len(times) // 2] * 1e3:.1f}"
        after = program.offload_figures()
        if after:
            moved = {key: after[key] - before[name][key] for key in after}
            said += (
                f" | {moved['bytes'] / steps / 1e6:.2f} MB, {moved['stalled'] / steps * 1e3:.1f} ms of stalls a token"
            )
            said += f" | {moved['corrected'] / moved['heads']:.1%} of heads corrected"
        print(f"blocking | {bandwidth:g} MB/s | {name} | {said}", flush=True)


def layout(bandwidth: float, rounds: int) -> None:
    """Bringing 24 pages of each of 3 heads: fragments as they lie against rows of tokens, one buffer against two."""
    shape, dtype = (1, 256, 3, 2, 32, 64), torch.float32
    generator = np.random.default_rng(0)
    pages = np.sort(np.stack([generator.permutation(256)[:24] for _ in range(3)]))
    plan = Plan(np.zeros(72, np.int64), np.repeat(np.arange(3), 24), np.tile(np.arange(24), 3), pages.reshape(-1))
    fast = torch.zeros(1, 32, 2, 32, 3, 64)
    pools = {buffers: open_pools([shape], [dtype], buffers=buffers)[0] for buffers in (1, 2)}
    for pool in pools.values():
        pool.reserve(256)
        pool.write(0, torch.randn(1, 3, 256, 2, 32, 64))
    for name, tier in {"page cache": Tier(0), f"{bandwidth:g} MB/s": Tier(bandwidth)}.items():
        with tier.of(pools[1].file), tier.of(pools[2].file):
            best = interleaved(
                {
                    "pages of a head, one buffer": lambda: pools[1].load(fast, plan),
                    "pages of a head, two buffers": lambda: pools[2].load(fast, plan),
                    "rows of tokens, one buffer": lambda: _load_rows(pools[1], fast, plan),
                },
                rounds,
            )
        for way, seconds in best.items():
            print(f"layout | {name} | {way} | {seconds * 1e3:.2f} ms for 72 fragments of 16 KB", flush=True)


def _load_rows(pool: FilePool, fast: Tensor, plan: Plan) -> None:
    """The same bytes where a page lies as projections emit it, [2, page, H, D]: a read for each row of a head."""
    rows = torch.empty(len(plan.page), 2 * 32, 64)
    view = bytes_of(rows)
    for number, (head, page) in enumerate(zip(plan.head.tolist(), plan.page.tolist(), strict=True)):
        for row in range(64):
            place = (number * 64 + row) * 256
            pool.file.read(view[place : place + 256], page * pool.file.record + (row * 3 + head) * 256)
    batch, head, slot, _ = plan.indices()
    fast[batch, slot, :, :, head] = rows.view(-1, 2, 32, 64)


def memory(layers: int | None) -> None:
    """What stays in memory for contexts of 2048 to 8192 tokens, at a budget of 1024."""
    for length in (2048, 4096, 8192):
        study = Study(layers, length, last=1)
        program = study.program(budget=1024, dense_layers=0)
        state, full = program._state(offloaded=False), study.canonical.state_bytes()
        fast, summary = (sum(t.nbytes for n, t in state.items() if n.endswith(e)) for e in (".fast", ".summary"))
        read(program, study.text()[:, : length - 1])
        print(
            f"memory | {length} tokens | at hand {fast / 1e6:.2f} MB, summaries {summary / 1e6:.2f} MB,"
            f" all state in memory {program.state_bytes() / 1e6:.2f} MB | full cache {full / 1e6:.2f} MB"
            f" | on disk {program.offloaded_bytes() / 1e6:.2f} MB",
            flush=True,
        )


def soak(study: Study, steps: int) -> None:
    """Memory and open files while tokens are generated."""
    program = study.program(budget=512)
    prompt = study.text()[:, : study.length - steps - 1]
    token, position = read(program, prompt).argmax(-1), prompt.shape[1]
    for step in range(steps + 1):
        if step % 200 == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            handles = len(os.listdir("/proc/self/fd"))
            threads = threading.active_count()
            print(
                f"soak | {step} tokens | resident {_resident() / 1e6:.0f} MB, most so far {peak:.0f} MB"
                f" | {handles} open files, {threads} threads | state {program.state_bytes() / 1e6:.2f} MB",
                flush=True,
            )
        token, position = program(token, torch.tensor([position]))[:, -1:].argmax(-1), position + 1


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["exact", "quality", "passkey", "blocking", "layout", "memory", "soak"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the cache and of the texts")
    parser.add_argument("--steps", type=int, default=48, help="tokens that are decoded")
    parser.add_argument("--texts", type=int, default=1, help="windows for the perplexity")
    parser.add_argument("--draws", type=int, default=1, help="texts of each of the depths 0 to 1")
    parser.add_argument("--ask", choices=["before", "after"], default="after", help="for the hidden number")
    parser.add_argument("--bandwidth", type=float, default=100, help="of the slow memory, MB/s; 0 leaves it as it is")
    options = parser.parse_args()
    with one_thread(), torch.no_grad():
        if options.part == "layout":
            layout(options.bandwidth, rounds=10)
        elif options.part == "memory":
            memory(options.layers)
        elif options.part == "quality":
            quality(Study(options.layers, options.length), options.texts)
        else:
            study = Study(options.layers, options.length, last=1)
            if options.part == "exact":
                exact(study, options.steps)
            elif options.part == "passkey":
                passkey(study, options.draws, options.ask)
            elif options.part == "blocking":
                blocking(study, options.steps, options.bandwidth)
            else:
                soak(study, options.steps)


if __name__ == "__main__":
    main()
