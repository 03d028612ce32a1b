"""What a program with a quantized cache predicts, as it would decode a text token by token, in few calls.

The first token is decoded, the rest goes through the phase that extends a cache: there every query reads the packed
cache, its own token included, so the logits are those of decoding one token after the other. KIVI's forms keep the last
block of 32 tokens in float16, so there a call takes one block at most; see `kernels/quantized_cache_attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InvalidArgument
from ..kernels.packed_cache import GROUP

READ = ("decode", "extend")
"""The phases that reading a text runs."""
_ROWS = 128
"""Rows of logits that are widened and normalised at a time."""


def decoded_logits(program: Any, tokens: Tensor, block: int | None = None) -> Tensor:
    """Logits [B, N, V] of tokens [B, N] read through the cache, from an empty one.

    Args:
        program: A program of `capture_causal_lm`; its state is reset.
        tokens: int64 [B, N].
        block: Tokens that a call takes at most, starting at multiples of it; all by default.
    """
    program.reset()
    count = tokens.shape[1]
    edges = sorted({0, 1, *range(block or count, count, block or count), count})
    calls = pairwise(edges)
    return torch.cat(
        [program(tokens[:, low:high], torch.arange(low, high, device=tokens.device)) for low, high in calls], 1
    )


def block_of(mode: str) -> int | None:
    """Tokens that one call of `decoded_logits` may take, for a mode of the packed cache."""
    return GROUP if mode == "kivi" else None


def decode_loss(program: Any, texts: Sequence[Tensor], block: int | None = None) -> float:
    """Mean negative log-likelihood of the next token, nats, over all tokens but each text's first.

    Raises:
        InvalidArgument: The program computes the last logits only.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens in texts:
            logits = _all_logits(program, tokens, block)[:, :-1].flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
                total += float(functional.cross_entropy(rows.float(), wanted, reduction="sum"))
            count += targets.numel()
    return total / count


class Divergence:
    """Mean Kullback-Leibler divergence of the next-token distribution from a reference program's, nats a token.

    It tells small damage apart on much less text than the loss does, since it does not depend on which token came.

    Args:
        reference: The program in full precision.
        texts: Tokens [B, N] each.
        block: As in `decoded_logits`.
    """

    def __init__(self, reference: Any, texts: Sequence[Tensor], block: int | None = None) -> None:
        self._texts, self._block = texts, block
        with torch.no_grad():
            self._expected = [_all_logits(reference, tokens, None) for tokens in texts]

    def __call__(self, program: Any) -> float:
        """The divergence of a program."""
        total, count = 0.0, 0
        with torch.no_grad():
            for tokens, expected in zip(self._texts, self._expected, strict=True):
                logits = _all_logits(program, tokens, self._block).flatten(0, 1)
                for rows, wanted in zip(logits.split(_ROWS), expected.flatten(0, 1).split(_ROWS), strict=True):
                    found, wanted = rows.float().log_softmax(-1), wanted.float().log_softmax(-1)
                    total += float(functional.kl_div(found, wanted, reduction="sum", log_target=True))
                count += tokens.numel()
        return total / count


def _all_logits(program: Any, tokens: Tensor, block: int | None) -> Tensor:
    logits = decoded_logits(program, tokens, block)
    if logits.shape[:2] != tokens.shape:
        raise InvalidArgument(
            f"the program gives logits {list(logits.shape)} for {list(tokens.shape)} tokens; capture it with"
            " logits_to_keep=0 to search on its loss, or give an objective of your own"
        )
    return logits
