"""Texts from a captured language model, token by token: greedy or sampled, prompts of different lengths in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InvalidArgument, OffloadError
from .prompts import Prompts, left_padded

if TYPE_CHECKING:
    from .program import Program


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when a text ends; see `Program.generate`.

    Raises:
        InvalidArgument: A number is out of its range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    eos_token_id: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InvalidArgument("max_new_tokens and temperature must not be negative, top_p must be in (0, 1]")


def generate(program: Program, tokens: Prompts, attention_mask: Tensor | None, how: Sampling) -> Tensor:
    """`Program.generate`."""
    if program.kind != "causal_lm":
        raise InvalidArgument(f"generate needs a program of capture_causal_lm, this one is a {program.kind}")
    fill = 0 if how.eos_token_id is None else how.eos_token_id
    tokens, starts = left_padded(tokens, attention_mask, program.facts["batch_size"], fill)
    padding = (starts,) if "starts" in program.inputs else ()
    if not padding and bool(starts.any()):
        raise InvalidArgument("prompts of different lengths need a program of capture_causal_lm(..., padding=True)")
    length, limit = tokens.shape[1], program.facts["max_cache_len"]
    if length + how.max_new_tokens > limit + 1:
        raise InvalidArgument(f"{length} + {how.max_new_tokens} tokens do not fit the captured cache of {limit}")
    text = [tokens]
    try:
        for chunk in _new_tokens(program, tokens, padding, how):
            text.append(chunk)
    except OffloadError as error:
        error.generated = torch.cat(text, 1)
        raise
    return torch.cat(text, 1)


def _new_tokens(program: Program, tokens: Tensor, padding: tuple[Tensor, ...], how: Sampling) -> Iterator[Tensor]:
    generator = None if how.seed is None else torch.Generator(tokens.device).manual_seed(how.seed)
    program.reset()
    position = torch.arange(tokens.shape[1], device=tokens.device)
    finished = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
    chunk = tokens
    for _ in range(how.max_new_tokens):
        logits = program(chunk, position, *padding)[:, -1].float()
        chunk = _pick(logits, how.temperature, how.top_p, generator)
        if how.eos_token_id is not None:
            chunk = torch.where(finished, how.eos_token_id, chunk)
            finished = finished | (chunk == how.eos_token_id)
        yield chunk
        if how.eos_token_id is not None and bool(finished.all()):
            return
        position = position[-1:] + 1


def _pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)
