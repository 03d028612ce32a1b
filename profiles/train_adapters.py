"""Train the adapters of a pruned program on texts, a few hundred steps at a time, and be ready to be interrupted.

AdamW with a linear schedule: up over the first share of the steps, then down to zero. Gradients of all adapters
together are clipped to a norm.

Defaults are those of LoSA's code (arXiv:2502.14816): rate 2e-4, warm-up 0.3, weight decay 1e-3, gradient norm 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument, MissingExtra
from .trainable_program import Adapter, TrainableProgram

_SMOOTH = 0.95
"""Share of the running loss that a step leaves, for the progress line."""


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        steps: Updates.
        batch: Texts of an update.
        lr, warmup, decay, clip: Largest rate, share of the steps until it, weight decay, norm of gradients.
        optimizer: "adamw", or "adamw8bit" of bitsandbytes, whose moments have 8 bits.
        seed: Of the order of texts.
    """

    steps: int
    batch: int = 1
    lr: float = 2e-4
    warmup: float = 0.3
    decay: float = 1e-3
    clip: float = 0.3
    optimizer: str = "adamw"
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step 0 to steps - 1."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * (self.steps - step) / max(1, self.steps - rise)


@dataclass
class Trained:
    """What training has done so far.

    Attributes:
        step: Steps that are done.
        losses: The mean loss of each, nats.
        moments: Step count and moments of the optimizer, by name; empty before the first step.
        stopped: Why it stopped early, "" if it did not.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    moments: dict[str, Tensor] = field(default_factory=dict)
    stopped: str = ""


def train_adapters(
    program: TrainableProgram,
    adapters: Sequence[Adapter],
    texts: Sequence[list[Any]],
    training: Training,
    state: Trained | None = None,
    on_step: Callable[[str], None] = lambda note: None,
    save: Callable[[Trained], None] | None = None,
    every: int = 50,
) -> Trained:
    """Train in place, from where `state` says.

    Args:
        program: The program that the adapters belong to.
        adapters: Their A and B change; everything else stays.
        texts: Flat inputs.
        training: How.
        state: What an interrupted run left; its adapters must be those that it left, too.
        on_step: Called after each step, with the loss and the perplexity in words.
        save: Called every so many steps and at the end.
        every: How many.

    Returns:
        What was done. A loss or a gradient that is not finite stops it; the adapters are then those of the last step
        that was saved, or of the start.

    Raises:
        InvalidArgument: There are no texts.
        MissingExtra: The 8-bit optimizer is asked for and not installed.
    """
    if not texts:
        raise InvalidArgument("there are no texts to train on")
    state = state or Trained()
    parameters = [part for adapter in adapters for part in (adapter.a, adapter.b)]
    optimizer = _optimizer(parameters, training)
    _restore(optimizer, parameters, state.moments)
    held = [parameter.detach().clone() for parameter in parameters]
    good = Trained(state.step, list(state.losses), dict(state.moments))
    smooth = state.losses[-1] if state.losses else None
    while state.step < training.steps:
        for group in optimizer.param_groups:
            group["lr"] = training.rate(state.step)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        with torch.enable_grad():
            for position in order(len(texts), training, state.step):
                loss = program.loss(texts[position]) / training.batch
                loss.backward()
                total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        if not (math.isfinite(total) and bool(norm.isfinite())):
            with torch.no_grad():
                for parameter, kept in zip(parameters, held, strict=True):
                    parameter.copy_(kept)
            good.stopped = f"the loss of step {state.step + 1} is not finite ({total}), nor need its gradient be"
            return good
        optimizer.step()
        state.step += 1
        state.losses.append(total)
        smooth = total if smooth is None else _SMOOTH * smooth + (1 - _SMOOTH) * total
        on_step(f"loss {smooth:.3f}, perplexity {math.exp(min(smooth, 50)):.2f}")
        if save is not None and (state.step % every == 0 or state.step == training.steps):
            state.moments = _moments(optimizer, parameters)
            save(state)
            held = [parameter.detach().clone() for parameter in parameters]
            good = Trained(state.step, list(state.losses), dict(state.moments))
    return state


def order(texts: int, training: Training, step: int) -> list[int]:
    """The texts of a step: all of them in an order that is drawn anew each time around."""
    result = []
    for number in range(step * training.batch, (step + 1) * training.batch):
        generator = torch.Generator().manual_seed(training.seed * 1_000_003 + number // texts)
        result.append(int(torch.randperm(texts, generator=generator)[number % texts]))
    return result


def _optimizer(parameters: list[Tensor], training: Training) -> torch.optim.Optimizer:
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.decay)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("bitsandbytes is not installed: pip install bitsandbytes") from error
    return AdamW8bit(parameters, lr=training.lr, weight_decay=training.decay)


def _moments(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    found = {}
    for number, parameter in enumerate(parameters):
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[f"{number}.{name}"] = value.detach().clone()
    return found


def _restore(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], moments: dict[str, Tensor]) -> None:
    for name, value in moments.items():
        number, key = name.split(".", 1)
        optimizer.state[parameters[int(number)]][key] = value.clone()
