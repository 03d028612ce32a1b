"""RazorAttention on SmolLM2: passkeys against the full cache and against other ways to keep as many bytes; time.

    python -m graphwright.benchmarks.razor scores --length 4096
    python -m graphwright.benchmarks.razor shares --length 4096 --draws 4
    python -m graphwright.benchmarks.razor ways --length 4096 --draws 4 --split calibration
    python -m graphwright.benchmarks.razor passkey --length 4096 --draws 4 --split calibration
    python -m graphwright.benchmarks.razor time --length 4096
    python -m graphwright.benchmarks.razor quantized --length 4096 --draws 4
    python -m graphwright.benchmarks.razor perplexity --length 4096 --draws 2

Each prints its lines as it goes. The question comes after the text was read (`passkey.py`).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import graphwright as gw
from graphwright.benchmarks.passkey import Hidden, answered, hide, read, shares
from graphwright.benchmarks.timing import interleaved, one_thread
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import read_text, token_windows
from graphwright.kernels import cache_append
from graphwright.kernels.window_cache import slots_for
from graphwright.kernels.window_cache_append import append
from graphwright.lowering.eager import lower_eager
from graphwright.profiles.razor import SHORT_CONTEXT, choose_heads
from graphwright.profiles.retrieval_heads import HeadScores

Heads = tuple[tuple[int, ...], ...]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DECODED = 256
"""Last tokens of a window whose loss is taken."""
SWEEP = (
    (0.05, 0.01, 256), (0.10, 0.01, 256), (0.14, 0.01, 256), (0.18, 0.02, 256), (0.22, 0.03, 256), (0.26, 0.03, 256),
    (0.26, 0.00, 256), (0.16, 0.10, 256), (0.06, 0.20, 256), (0.22, 0.03, 64), (0.22, 0.03, 128), (0.22, 0.03, 512),
)  # fmt: skip
"""Shares by induction and by echo, and windows."""
WAYS = ((0.22, 0.14, 256), (0.28, 0.04, 256), (0.10, 0.22, 256), (0.26, 0.18, 64), (0.12, 0.06, 768))
"""The same, of about equal bytes."""


class Study:
    """One model with a cache for texts of one length.

    Attributes:
        canonical: Its program with the full cache.
        scores: Of all heads, by layer.
    """

    def __init__(self, layers: int | None, length: int, split: Any) -> None:
        self.length, self.split = length, split
        self.captured = gw.capture_causal_lm(load_smollm2(layers=layers), max_cache_len=length, logits_to_keep=1)
        self.canonical = gw.optimize(self.captured, progress=False)
        self.scores = self.scored()

    def scored(self, **options: Any) -> list[HeadScores]:
        """Scores of all heads, by layer, as the method with these options takes them."""
        started = time.perf_counter()
        razored = self.program(SHORT_CONTEXT | options)
        record = razored.profile.measured["razor"]
        print(f"scores | {self.bytes(razored)} | optimize {time.perf_counter() - started:.0f} s", flush=True)
        return [
            HeadScores(str(layer), tuple(induction), tuple(echo))
            for layer, (induction, echo) in enumerate(zip(record["induction"], record["echo"], strict=True))
        ]

    def program(self, options: dict[str, Any], *others: gw.Method) -> gw.Program:
        """What RazorAttention makes with these options."""
        methods = [gw.RazorAttention(**options), *others]
        return gw.optimize(self.captured, methods=methods, progress=False)

    def heads(self, induction: float, echo: float) -> Heads:
        """The heads that these shares keep."""
        chosen = choose_heads(self.scores, induction, echo)
        return tuple(chosen[score.place] for score in self.scores)

    def random_heads(self, count: int, seed: int) -> Heads:
        """As many heads of all layers, at random."""
        each = len(self.scores[0].induction)
        order = torch.randperm(each * len(self.scores), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        return tuple(tuple(h for h in range(each) if layer * each + h in order) for layer in range(len(self.scores)))

    def bytes(self, program: gw.Program) -> str:
        """Of the state, and as a share of the full cache."""
        mine, full = program.state_bytes(), self.canonical.state_bytes()
        return f"{mine / 1e6:.1f} MB | {mine / full:.3f} of the full cache"

    def texts(self, draws: int) -> list[Hidden]:
        """Texts with numbers, one a depth and draw."""
        tokenizer, prose = load_tokenizer(), read_text(self.split)
        return [text for seed in range(draws) for text in hide(tokenizer, prose, self.length, DEPTHS, seed)]

    def passkey(self, draws: int) -> None:
        """The method, its parts left out, and others of equal bytes."""
        kept = {"window": SHORT_CONTEXT["window"], "ratio": SHORT_CONTEXT["ratio"]}
        heads = self.heads(SHORT_CONTEXT["induction"], SHORT_CONTEXT["echo"])
        count, all_heads = sum(map(len, heads)), sum(len(score.induction) for score in self.scores)
        window = gw.RazorAttention(**SHORT_CONTEXT).window_for(self.length)
        equal = slots_for(4, window, torch.float32) + (self.length - window) * count // all_heads
        nothing: Heads = ((),) * len(heads)
        candidates: dict[str, dict[str, Any]] = {
            f"RazorAttention, {count} of {all_heads} heads": kept | {"heads": heads},
            "the same without compensation": kept | {"heads": heads, "compensate": False},
            "sinks and window, all heads": {"heads": nothing, "window": equal, "ratio": 1e6, "compensate": False},
            "sinks, window and mean, all heads": {"heads": nothing, "window": equal, "ratio": 1e6},
        }
        for seed in range(3):
            candidates[f"{count} random heads, seed {seed}"] = kept | {"heads": self.random_heads(count, seed)}
        self.compare({"full cache": self.canonical} | self.programs(candidates), draws)

    def shares(self, draws: int) -> None:
        """Fewer and more heads, by induction and by echo; shorter and longer windows."""
        candidates: dict[str, dict[str, Any]] = {}
        for induction, echo, window in SWEEP:
            name = f"{induction:.0%} and {echo:.0%}, window {window}"
            candidates[name] = {"heads": self.heads(induction, echo), "window": window, "ratio": 1e6}
        self.compare(self.programs(candidates), draws)

    def ways(self, draws: int) -> None:
        """Other ways to spend about the bytes of `SHORT_CONTEXT`: which heads, how many, and on what besides."""
        base, count = self.short_context(), sum(map(len, self.short_context()["heads"]))
        candidates: dict[str, dict[str, Any]] = {
            f"SHORT_CONTEXT, {count} heads": base,
            "without compensation": base | {"compensate": False},
            "64 sinks": base | {"sinks": 64},
            "heads by the greater of their scores": base | {"heads": self.best_heads(count, max)},
            "heads by the sum of their scores": base | {"heads": self.best_heads(count, lambda i, e: i + e)},
        }
        for induction, echo, window in WAYS:
            name = f"{induction:.0%} and {echo:.0%}, window {window}"
            candidates[name] = {"heads": self.heads(induction, echo), "window": window, "ratio": 1e6}
        self.scores = self.scored(draws=4)
        candidates["scores of four draws"] = self.short_context()
        self.scores = self.scored(tokens=128, repeats=8)
        candidates["scores of 128 tokens, eight times"] = self.short_context()
        self.compare({"full cache": self.canonical} | self.programs(candidates), draws)

    def best_heads(self, count: int, score: Callable[[float, float], float]) -> Heads:
        """The heads of all layers that are best by a function of induction and echo."""
        marks = [[score(*pair) for pair in zip(layer.induction, layer.echo, strict=True)] for layer in self.scores]
        least = sorted((mark for layer in marks for mark in layer), reverse=True)[count - 1]
        return tuple(tuple(head for head, mark in enumerate(layer) if mark >= least) for layer in marks)

    def programs(self, candidates: dict[str, dict[str, Any]]) -> dict[str, gw.Program]:
        """Of options by name."""
        return {name: self.program(options) for name, options in candidates.items()}

    def compare(self, candidates: dict[str, gw.Program], draws: int) -> None:
        """Numbers found, digits found and bytes of each.

        A prefill attends to everything whatever is kept, so each text is read once, with the full cache.
        """
        right: dict[str, list[list[bool]]] = {name: [] for name in candidates}
        for text in self.texts(draws):
            read(self.canonical, text)
            full = {name: tensor.clone() for name, tensor in self.canonical._state().items()}
            for name, program in candidates.items():
                if program is not self.canonical:
                    carry(full, program, text.text.shape[1])
                right[name].append(answered(program, text))
        for name, program in candidates.items():
            numbers, digits = shares(right[name])
            said = f"{numbers:.0%} of {len(right[name])} numbers | {digits:.0%} of digits"
            print(f"passkey | {name} | {said} | {self.bytes(program)}", flush=True)

    def quantized(self, draws: int) -> None:
        """The kept heads' caches packed besides."""
        self.compare(self.chosen(), draws)

    def perplexity(self, draws: int) -> None:
        """Of the last tokens of windows as long as the cache, decoded one by one after the rest was read."""
        texts = list(token_windows(load_tokenizer(), read_text("evaluation"), self.length, draws).split(1))
        bare = self.program(self.short_context() | {"compensate": False})
        programs = self.chosen() | {"RazorAttention without compensation": bare}
        losses = dict.fromkeys(programs, 0.0)
        for tokens in texts:
            start = tokens.shape[1] - DECODED
            self.canonical.reset()
            self.canonical(tokens[:, :start], torch.arange(start))
            full = {name: tensor.clone() for name, tensor in self.canonical._state().items()}
            for name, program in programs.items():
                if program is not self.canonical:
                    carry(full, program, start)
                for at in range(start, tokens.shape[1] - 1):
                    logits = program(tokens[:, at : at + 1], torch.tensor([at]))
                    losses[name] += float(functional.cross_entropy(logits[:, -1].float(), tokens[:, at + 1]))
        for name, program in programs.items():
            value = math.exp(losses[name] / len(texts) / (DECODED - 1))
            print(f"perplexity | {name} | {value:.3f} | {self.bytes(program)}", flush=True)

    def chosen(self) -> dict[str, gw.Program]:
        """The full cache, the method with the heads of `SHORT_CONTEXT`, and those heads' caches packed."""
        razor = self.short_context()
        programs = {"full cache": self.canonical, "RazorAttention": self.program(razor)}
        for key_bits, value_bits in ((8, 8), (8, 4), (4, 4)):
            packed = gw.KVTuner(table=((key_bits, value_bits),) * len(self.scores))
            programs[f"RazorAttention, K{key_bits}V{value_bits}"] = self.program(razor, packed)
        return programs

    def short_context(self) -> dict[str, Any]:
        """Its options, with heads by the scores at hand."""
        return SHORT_CONTEXT | {"heads": self.heads(SHORT_CONTEXT["induction"], SHORT_CONTEXT["echo"])}

    def time(self, rounds: int) -> None:
        """One token at the last position: the whole step, and attention alone."""
        programs = self.chosen()
        token, last = torch.tensor([[1]]), torch.tensor([self.length - 1])
        steps = {name: (lambda p=program: p(token, last)) for name, program in programs.items()}
        _print_times("whole step", interleaved(steps, rounds, warmup=2))
        two = {"full cache": self.canonical, "RazorAttention": programs["RazorAttention"]}
        graphs = {name: _lowered(program, token, last) for name, program in two.items()}
        nodes = {name: {node.name for node in module.graph.nodes} for name, (module, _) in graphs.items()}
        # What was replaced, and what stands in its place: attention, writes, and choosing heads.
        full, razor = nodes.values()
        changed = {"full cache": full - razor, "RazorAttention": razor - full}
        alone = {name: _alone(*graphs[name], changed[name]) for name in graphs}
        _print_times("attention and writes, all layers", interleaved(alone, rounds, warmup=2))


def carry(sources: Mapping[str, Tensor], split: gw.Program, tokens: int) -> None:
    """Give a split program the cache that it would have after a prefill that filled a full cache."""
    split.reset()
    state, positions = split._state(), torch.arange(tokens)
    settled: dict[int, gw.Decision] = {}
    for decision in split.decisions:  # a layer that is not split may be packed, by a decision of its own
        layer = int(decision.place.split("layers.")[1].split(".")[0])
        if decision.phase == "decode" and (decision.status == "kept" or layer not in settled):
            settled[layer] = decision
    for layer, decision in settled.items():
        for half in ("key", "value"):
            name = f"{half}_cache_{layer}"
            source = sources[name]
            if decision.status != "kept":
                state[name].copy_(source)
                continue
            heads = range(source.shape[1])
            whole = decision.options.get("keep", list(heads))
            packed = next((each for each in state if each.startswith(f"{name}.per_")), None)
            if packed is not None:
                form, bits = packed.removeprefix(f"{name}.")[:-1], int(packed[-1])
                cache_append.append(state[packed], positions, source[:, whole, :tokens], bits, form)
            elif whole:
                state[f"{name}.kept"].copy_(source[:, whole])
            if others := [head for head in heads if head not in whole]:
                append(state[f"{name}.window"], positions, source[:, others, :tokens], decision.options["sinks"])


def _print_times(what: str, best: dict[str, float]) -> None:
    for name, seconds in best.items():
        ratio = best["full cache"] / seconds
        print(f"time | {what} | {name} | {seconds * 1e3:.2f} ms | {ratio:.2f}x", flush=True)


def _lowered(program: gw.Program, *inputs: Tensor) -> tuple[torch.fx.GraphModule, list[Any]]:
    """What a call runs, and what it is run on."""
    _, phase, flat = program.dispatch(*inputs)
    module = lower_eager(program.phases[phase].exported)
    assert isinstance(module, torch.fx.GraphModule)
    return module, flat


def _alone(module: torch.fx.GraphModule, flat: list[Any], names: set[str]) -> Callable[[], Any]:
    """A call of some nodes of a graph only, on what they are given there."""
    inputs = _Inputs(module, names)
    inputs.run(*flat)
    graph, values = torch.fx.Graph(), {}
    for outer in inputs.seen:
        values[outer] = graph.placeholder(outer.name)
    nodes = [node for node in module.graph.nodes if node.name in names and node.op == "call_function"]
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(values[nodes[-1]])
    part = torch.fx.GraphModule(module, graph)
    return lambda: part(*inputs.seen.values())


class _Inputs(torch.fx.Interpreter):
    """What some nodes read that they do not make."""

    def __init__(self, module: torch.fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names
        self.seen: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.name in self.names and n.op == "call_function":
            for source in n.all_input_nodes:
                if source.name not in self.names or source.op != "call_function":
                    self.seen[source] = self.env[source]
        return super().run_node(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["scores", "passkey", "shares", "ways", "time", "quantized", "perplexity"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the cache and of the texts")
    parser.add_argument("--draws", type=int, default=1, help="texts of each of the depths 0 to 1")
    parser.add_argument("--split", default="evaluation", choices=["calibration", "evaluation"], help="whose prose")
    options = parser.parse_args()
    with one_thread(), torch.no_grad():
        study = Study(options.layers, options.length, options.split)
        if options.part == "scores":
            for score in study.scores:
                induction, echo = (" ".join(f"{v:.3f}" for v in kind) for kind in (score.induction, score.echo))
                print(f"scores | layer {score.place} | induction {induction} | echo {echo}")
        elif options.part == "time":
            study.time(rounds=10)
        else:
            getattr(study, options.part)(options.draws)


if __name__ == "__main__":
    main()
