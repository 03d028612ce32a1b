"""LoSA: sparse weights, recovered by low-rank adapters that merge into them without filling a zero.

For t = 1 .. steps, each with more sparsity (`layer_rates.py`):

1. Merge the adapters. Layers whose inputs are like those of the others (`cka.py`) get a little more sparsity, the
   others a little less.
2. Prune layer by layer, on what the pruned layers give: Wanda or SparseGPT (`prune_layers.py`).
3. Layers whose output that changed most get adapters of larger rank.
4. Train the adapters on the given texts (`train_adapters.py`), masked by the weights' zeros.

In the end the adapters are merged. The zeros are those of the last pruning, bit by bit.

With an n:m pattern all layers are alike, and m - n grows with the schedule; 2:4 reaches its half in the last step.

Source: LoSA (Huang et al., ICLR 2025, arXiv:2502.14816) and its code. It allocates adapters of rank 8 and so cuts ranks
above; here 16 are allocated, as its formula has them. Steps, rate and so on of the training are published for 7B models
and thousands of rows; the example for SmolLM2 has its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..errors import InvalidArgument
from ..kernels.bitmask_weights import compress
from ..passes.decision import Decision
from ..patterns.graph import GraphView
from ..patterns.linear import LinearSite
from .activation_samples import tokens_of
from .amber import prefill_of, weights_of
from .layer_rates import layer_ranks, layer_rates, schedule
from .linear_method import LinearMethod, Roles
from .method import Context
from .profile import data_hash, fingerprint
from .prune_layers import Layer, Pruner, Weights, find_layers, layer_outputs, layer_redundancy, prune_layers
from .train_adapters import Trained, Training, train_adapters
from .trainable_program import Adapter, TrainableProgram
from .training_folder import TrainingFolder

FEWEST_TEXTS, FEWEST_TOKENS = 4, 128
"""Similarity of layers compares texts, and a norm over fewer tokens than this ranks channels by chance."""


class LoSA(LinearMethod):
    """Prune step by step, and train mergeable adapters in between."""

    name: ClassVar[str] = "losa"
    reference: ClassVar[str] = "LoSA: Huang et al., ICLR 2025, arXiv 2502.14816"
    rewrites: ClassVar[str] = "linears: sparse weights, recovered by low-rank adapters that are merged"

    sparsity: float = Field(0.6, ge=0, lt=1, description="Share of zeros in the pruned weights.")
    pattern: tuple[int, int] | None = Field(None, description="n of every m weights stay; the sparsity is then theirs.")
    pruner: Literal["wanda", "sparsegpt"] = Field("wanda", description="What chooses the zeros.")
    steps: int = Field(5, ge=1, description="Times that pruning and training alternate.")
    rates: Literal["similarity", "uniform", "reversed"] = Field(
        "similarity", description="How sparsity is spread over layers; reversed is for comparison."
    )
    rank: tuple[int, int] = Field((6, 10), description="Mean rank of the adapters at the first step and at the last.")
    ranks: Literal["error", "uniform"] = Field("error", description="How ranks are spread over layers.")
    samples: int = Field(32, ge=FEWEST_TEXTS, description="Texts that pruning looks at.")
    train_steps: int = Field(100, ge=0, description="Updates of the adapters in each step; 0 prunes only.")
    batch: int = Field(1, ge=1, description="Calls of the program in an update.")
    lr: float = Field(2e-4, gt=0, description="Largest learning rate (published).")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit is that of bitsandbytes.")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the products in training; auto is bfloat16 where the processor multiplies it."
    )
    checkpointing: bool = Field(True, description="Recompute layers on the way back instead of keeping their values.")
    masked: bool = Field(True, description="Keep zeros while training; without, merging fills them: for comparison.")
    roles: Roles = Field(("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"), description="Roles to prune.")
    form: Literal["compressed", "dense"] = Field(
        "compressed", description="How the weights are stored: a bit a place and the values, or with their zeros."
    )
    folder: Path | None = Field(None, exclude=True, description="Where an interrupted run goes on from.")
    save_every: int = Field(50, ge=1, exclude=True, description="Updates after which the folder is written.")
    seed: int = Field(0, ge=0, description="Of the adapters and of the order of texts.")

    @field_validator("pattern")
    @classmethod
    def _n_of_m(cls, pattern: tuple[int, int] | None) -> tuple[int, int] | None:
        if pattern is not None and not 1 <= pattern[0] <= pattern[1]:
            raise ValueError(f"got n={pattern[0]} of m={pattern[1]}, expected 1 to {pattern[1]}")
        return pattern

    def decide(self, context: Context) -> list[Decision]:
        """Prune and train, and name the weights that came out.

        Raises:
            InvalidArgument: No linear has a floating-point weight, layers cannot be told apart, the texts are too few,
                or the loss was not finite: the folder then holds the last good state.
            StaleProfile: The folder holds the run of another program, of other texts or options.
            MissingExtra: The 8-bit optimizer is not installed.
        """
        phase = prefill_of(context)
        sites = context.sites[phase].linear
        if not sites:
            raise InvalidArgument("losa: no linear of this program has a floating-point weight; it may be quantized")
        reasons = {site.place: self._declined(site) for site in sites}
        layers = find_layers(GraphView(context.phases[phase]), sites)
        made = _Run(self, context, phase, layers, reasons).weights()
        names: dict[str, str] = {}
        for number, (place, weight) in enumerate(made.items()):
            names[place] = f"losa.{number}"
            parts = compress(weight)
            context.tensors.update({f"{names[place]}.{part}": getattr(parts, part) for part in parts._fields})
        zeros = sum(int((weight == 0).sum()) for weight in made.values())
        context.measured["losa"]["zeros"] = zeros / (sum(weight.numel() for weight in made.values()) or 1)
        return [
            self._decision(site, names, reasons, total)
            for found in context.sites.values()
            for total in (sum(weights_of(site) for site in found.linear) or 1,)
            for site in found.linear
        ]

    def pattern_at(self, step: int) -> tuple[int, int] | None:
        """The pattern after a step, which keeps no less than the schedule says."""
        if self.pattern is None:
            return None
        n, m = self.pattern
        kept = m * (1 - schedule(1 - n / m, step, self.steps))
        return (n if step == self.steps else min(m, -int(-kept // 1)), m)

    def mean_rank(self, step: int) -> int:
        """The mean rank of a step, from the first of `rank` to the second."""
        low, high = self.rank
        return round(low + (high - low) * (step - 1) / max(1, self.steps - 1))

    def _declined(self, site: LinearSite) -> str:
        if reason := self.left_out(site, self.roles):
            return reason
        if self.pattern is not None and site.in_features % self.pattern[1]:
            return f"blocks of {self.pattern[1]} do not divide {site.in_features} channels"
        return "its weight is shared" if site.shared_weight else ""

    def _decision(self, site: LinearSite, names: Mapping[str, str], reasons: Mapping[str, str], total: int) -> Decision:
        reason = reasons.get(site.place, "the phase that was pruned has no such site")
        if not reason and site.place not in names:
            reason = "no layer has it"
        return Decision(
            site=site.id,
            method=self.name,
            pass_name="merge_sparse_adapters",
            options={} if reason else {"weight": names[site.place], "form": self.form},
            status="refused" if reason else "proposed",
            reason=reason,
            facts=site.describe(),
            predicted_gain=weights_of(site) / total,
        )


class _Run:
    """One run of the method, which may have been interrupted before."""

    def __init__(
        self, method: LoSA, context: Context, phase: str, layers: Sequence[Layer], reasons: Mapping[str, str]
    ) -> None:
        self.method, self.context, self.layers = method, context, layers
        self.exported = context.phases[phase]
        self.texts = list(context.calibration.get(phase, []))
        self.samples = _spread_over(_of_one_length(self.texts), method.samples)
        if len(self.samples) < FEWEST_TEXTS or tokens_of(self.samples) < FEWEST_TOKENS:
            raise InvalidArgument(
                f"losa needs at least {FEWEST_TEXTS} texts of one length and {FEWEST_TOKENS} tokens, got"
                f" {len(self.samples)} and {tokens_of(self.samples)}; pass more calibration="
            )
        view = GraphView(self.exported)
        self.sites = {s.place: s for layer in layers for s in layer.sites if not reasons[s.place]}
        self.layer_of = {s.place: number for number, layer in enumerate(layers) for s in layer.sites}
        stored = {place: view.tensor(site.weight) for place, site in self.sites.items()}
        self.original: Weights = {place: weight.detach() for place, weight in stored.items() if weight is not None}
        self.folder = TrainingFolder(
            method.folder,
            {
                "weights": fingerprint({phase: self.exported}).weights,
                "texts": data_hash(self.texts),
                "options": method.model_dump(mode="json"),
            },
        )
        self.history: list[dict[str, Any]] = list(self.folder.record.get("history", []))
        self.adapters: dict[str, Adapter] = {}

    def weights(self) -> Weights:
        """The sparse weights, adapters merged."""
        method = self.method
        record, trained = self.folder.record, None
        first = int(record.get("step", 0)) or 1
        if record:
            trained = self._loaded(record)
        dense = None
        for step in range(first, method.steps + 1):
            if trained is None:
                if dense is None:
                    dense = layer_outputs(self.exported, self.samples, self.layers)
                self._prune(step, dense)
                trained = Trained()
                self._save(step, trained, whole=True)
            self._train(step, trained)
            trained = None
        self.context.measured["losa"] = {"steps": self.history}
        return {
            place: adapter.merged() if method.masked else torch.where(adapter.weight != 0, adapter.merged(), 0.0)
            for place, adapter in self.adapters.items()
        }

    def _prune(self, step: int, dense: Any) -> None:
        """Steps 1 to 3."""
        method, started = self.method, time.perf_counter()
        target, pattern = schedule(method.sparsity, step, method.steps), method.pattern_at(step)
        target = target if pattern is None else 1 - pattern[0] / pattern[1]
        merged = {place: adapter.merged() for place, adapter in self.adapters.items()} or self.original
        redundant = layer_redundancy(self.exported, self.samples, self.layers, merged)
        if method.rates == "reversed":
            redundant = [-value for value in redundant]
        flat = method.rates == "uniform" or pattern is not None
        rates = layer_rates(redundant, target, 0.0 if flat else None)
        with self.context.progress.stage(f"prune, step {step} of {method.steps}", len(self.sites)):
            pruned, errors = prune_layers(
                self.exported,
                self.samples,
                self.layers,
                merged,
                Pruner(method.pruner),
                rates,
                pattern,
                dense,
                self.context.progress.step,
            )
        mean = method.mean_rank(step)
        ranks = layer_ranks(errors, mean) if method.ranks == "error" else [mean] * len(errors)
        generator = torch.Generator().manual_seed(method.seed)
        for place, weight in pruned.items():
            held = self.adapters.get(place) or Adapter.fresh(weight, generator, method.masked)
            held.weight = held.unmerged(weight) if method.masked else weight
            if not method.masked:
                with torch.no_grad():  # what was merged stays merged; the update starts anew
                    held.b.zero_()
            held.rank = ranks[self.layer_of[place]]
            self.adapters[place] = held
        zeros = sum(int((weight == 0).sum()) for weight in pruned.values())
        self.history.append(
            {
                "sparsity": target,
                "pattern": pattern,
                "zeros": zeros / sum(weight.numel() for weight in pruned.values()),
                "rates": rates,
                "redundancy": redundant,
                "errors": errors,
                "ranks": ranks,
                "prune_seconds": time.perf_counter() - started,
            }
        )

    def _train(self, step: int, trained: Trained) -> None:
        method = self.method
        if trained.step >= method.train_steps:
            return
        nodes = {self.sites[place].node: adapter for place, adapter in self.adapters.items()}
        cuts = [layer.output for layer in self.layers] if method.checkpointing else []
        program = TrainableProgram(self.exported, nodes, cuts, _dtype(method.compute))
        training = Training(
            method.train_steps, method.batch, method.lr, optimizer=method.optimizer, seed=method.seed * 1000 + step
        )
        started = time.perf_counter()
        title = f"train adapters, step {step} of {method.steps}"
        with self.context.progress.stage(title, method.train_steps - trained.step):
            done = train_adapters(
                program,
                list(self.adapters.values()),
                self.texts,
                training,
                trained,
                self.context.progress.step,
                lambda state: self._save(step, state),
                method.save_every,
            )
        last = self.history[-1]
        last["losses"] = done.losses
        last["train_seconds"] = last.get("train_seconds", 0.0) + time.perf_counter() - started
        self._save(step, done)
        if done.stopped:
            kept = f"the state after {done.step} updates is in {method.folder}" if method.folder else "nothing was kept"
            raise InvalidArgument(f"losa: {done.stopped}; {kept}. Try a smaller lr")

    def _save(self, step: int, trained: Trained, whole: bool = False) -> None:
        """Keep weights once a step, adapters and moments each time."""
        if self.folder.path is None:
            return
        files: dict[str, dict[str, Tensor]] = {"training": dict(trained.moments)}
        for place, adapter in self.adapters.items():
            files["training"] |= {f"a.{place}": adapter.a.detach(), f"b.{place}": adapter.b.detach()}
        if whole:
            files["weights"] = {place: adapter.weight for place, adapter in self.adapters.items()}
        record = {
            "step": step,
            "updates": trained.step,
            "losses": trained.losses,
            "ranks": {place: adapter.rank for place, adapter in self.adapters.items()},
            "history": self.history,
        }
        self.folder.save(record, files)

    def _loaded(self, record: Mapping[str, Any]) -> Trained:
        weights, training = self.folder.tensors("weights"), self.folder.tensors("training")
        for place, rank in record["ranks"].items():
            a, b = (training.pop(f"{part}.{place}").requires_grad_() for part in ("a", "b"))
            self.adapters[place] = Adapter(weights[place], a, b, int(rank), self.method.masked)
        return Trained(int(record["updates"]), list(record["losses"]), training)


def _dtype(compute: str) -> torch.dtype:
    if compute == "float32":
        return torch.float32
    able = torch.cpu.get_capabilities()
    quick = any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if quick or compute == "bfloat16" else torch.float32


def _of_one_length(texts: Sequence[list[Any]]) -> list[list[Any]]:
    """The longest texts among those of one length, which most have."""
    by_length: dict[int, list[list[Any]]] = {}
    for text in texts:
        by_length.setdefault(tokens_of([text]), []).append(text)
    return max(by_length.values(), key=lambda group: (len(group), tokens_of(group)), default=[])


def _spread_over(texts: Sequence[list[Any]], count: int) -> list[list[Any]]:
    if len(texts) <= count:
        return list(texts)
    return [texts[position * len(texts) // count] for position in range(count)]
