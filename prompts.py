"""Prompts of different lengths as one batch: padded on the left, so that all of them end where the new tokens go.

[[5, 6, 7], [8]]   becomes   tokens [[5, 6, 7], [0, 0, 8]]   starts [0, 2]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InvalidArgument, InvalidType

Prompts = Tensor | Sequence[Tensor | Sequence[int]]
"""int64 [batch, prompt], or a list of token lists or of tensors [prompt] or [1, prompt]."""


def left_padded(prompts: Prompts, attention_mask: Tensor | None, batch: int, fill: int) -> tuple[Tensor, Tensor]:
    """One batch of prompts.

    Args:
        prompts: See `Prompts`.
        attention_mask: [batch, prompt], one where a token is real, zero where it is padding; of a tensor of prompts.
        batch: Sequences that the program was captured for.
        fill: The token that pads prompts which come as a list; no query sees it.

    Returns:
        Tokens int64 [batch, longest], and the place of each sequence's first real token, int64 [batch].

    Raises:
        InvalidType: The prompts are not so many, or not of integers.
        InvalidArgument: A prompt is empty, or the mask has padding after a token or in all of a row.
    """
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.shape[0] != batch or prompts.shape[1] < 1 or prompts.dtype != torch.int64:
            dtype = str(prompts.dtype).removeprefix("torch.")
            raise InvalidType(f"tokens must be int64 [{batch}, prompt], got {dtype} {list(prompts.shape)}")
        return prompts, _starts(prompts, attention_mask)
    if attention_mask is not None:
        raise InvalidArgument("an attention_mask goes with tokens [batch, prompt]; a list of prompts needs none")
    if not isinstance(prompts, Sequence) or len(prompts) != batch:
        got = f"{len(prompts)} prompts" if isinstance(prompts, Sequence) else type(prompts).__name__
        raise InvalidType(f"tokens must be int64 [{batch}, prompt] or a list of {batch} prompts, got {got}")
    rows = [_row(prompt, number) for number, prompt in enumerate(prompts)]
    longest = max(map(len, rows))
    starts = torch.tensor([longest - len(row) for row in rows], device=rows[0].device)
    return torch.stack([torch.cat([row.new_full((longest - len(row),), fill), row]) for row in rows]), starts


def _row(prompt: Tensor | Sequence[int], number: int) -> Tensor:
    """A prompt as int64 [prompt]."""
    try:
        row = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(f"prompt {number} is no list of tokens: {error}") from error
    if row.dim() == 2 and row.shape[0] == 1:
        row = row[0]
    if row.numel() == 0:
        raise InvalidArgument(f"prompt {number} is empty")
    if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
        raise InvalidType(f"prompt {number} must be integers [prompt], got {row.dtype} {list(row.shape)}")
    return row.long()


def _starts(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The first real token of each row [batch]."""
    if mask is None:
        return torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    if mask.shape != tokens.shape:
        raise InvalidType(f"attention_mask must be {list(tokens.shape)} like the tokens, got {list(mask.shape)}")
    real = mask.bool()
    for number, row in enumerate(real.tolist()):
        if not any(row):
            raise InvalidArgument(f"row {number} of the attention_mask is all padding")
        if not all(row[row.index(True) :]):
            raise InvalidArgument(f"row {number} of the attention_mask has padding after a token; pad on the left")
    return real.byte().argmax(1)
