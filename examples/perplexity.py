"""Perplexity of a language model on the texts in `examples/data`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from graphwright.errors import InvalidArgument
from graphwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DATA = Path(__file__).parent / "data"
# Rows of logits that are widened to float32 at a time: 25 MB at a vocabulary of 49,152, whatever the window.
_ROWS = 128


def read_text(split: Literal["calibration", "evaluation"]) -> str:
    """Articles of WikiText-2: "calibration" for calibration and search, "evaluation" for perplexity; none is in both.

    Raises:
        InvalidArgument: there is no such split.
    """
    if split not in ("calibration", "evaluation"):
        raise InvalidArgument(f"got split={split!r}, expected 'calibration' or 'evaluation'")
    return (_DATA / f"wikitext2-{split}.txt").read_text(encoding="utf-8")


def token_windows(tokenizer: PreTrainedTokenizerBase, text: str, window: int = 512, limit: int | None = None) -> Tensor:
    """Cut a text into windows of tokens that do not overlap; what is left at the end is dropped.

    Args:
        tokenizer: Makes the tokens; it adds none of its own.
        text: The text.
        window: Tokens in a window, at least 2.
        limit: At most this many windows, spread evenly over the text.

    Returns:
        The tokens, int64 [n, window].

    Raises:
        InvalidArgument: `window` or `limit` is too small, or the text does not fill one window.
    """
    if window < 2 or (limit is not None and limit < 1):
        raise InvalidArgument(f"got window={window} and limit={limit}, expected at least 2 and at least 1")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    count = len(tokens) // window
    if count == 0:
        raise InvalidArgument(f"got a text of {len(tokens)} tokens, expected at least one window of {window}")
    windows = tokens[: count * window].view(count, window)
    if limit is None or limit >= count:
        return windows
    return windows[torch.arange(limit) * count // limit + count // (2 * limit)]


def perplexity(logits_of: Callable[[Tensor], Tensor], windows: Tensor, progress: bool = True) -> float:
    """The exponential of the mean negative log-likelihood of the next token, over all tokens but each window's first.

    Args:
        logits_of: Gives the logits [1, S, V] of tokens [1, S], in any floating dtype.
        windows: Tokens [n, S].
        progress: Show a progress bar, if standard error is a terminal.

    Returns:
        The perplexity; the vocabulary's size for a model that knows nothing.

    Raises:
        InvalidArgument: `windows` is not [n, S] with n at least 1 and S at least 2, or the logits do not fit it.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidArgument(f"got windows of shape {list(windows.shape)}, expected [n >= 1, S >= 2]")
    total = 0.0
    with torch.no_grad(), Progress(progress) as bar, bar.stage("perplexity", len(windows)):
        for window in windows:
            logits = logits_of(window[None])
            if logits.dim() != 3 or logits.shape[:2] != (1, len(window)):
                raise InvalidArgument(f"got logits of shape {list(logits.shape)}, expected [1, {len(window)}, V]")
            total += _negative_log_likelihood(logits[0, :-1], window[1:])
            bar.step()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def log_probabilities(logits_of: Callable[[Tensor], Tensor], windows: Tensor) -> list[Tensor]:
    """Log-probabilities [S, V] of each window, float32: what `divergence` compares with.

    Args:
        logits_of: As in `perplexity`.
        windows: Tokens [n, S].
    """
    with torch.no_grad():
        return [logits_of(window[None])[0].float().log_softmax(-1) for window in windows]


def divergence(logits_of: Callable[[Tensor], Tensor], windows: Tensor, reference: Sequence[Tensor]) -> float:
    """Mean Kullback-Leibler divergence from the reference's next-token distribution, in nats a token.

    On few tokens this tells small damage apart much better than a difference of perplexities: it compares whole
    distributions, and it cannot be negative by luck. For a good model it is about the rise of the log-perplexity.

    Args:
        logits_of: As in `perplexity`.
        windows: Tokens [n, S].
        reference: What `log_probabilities` gave for the reference on the same windows.
    """
    total = 0.0
    for expected, got in zip(reference, log_probabilities(logits_of, windows), strict=True):
        total += float((expected.exp() * (expected - got)).sum(-1).mean())
    return total / len(windows)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """The sum over rows of -log softmax(logits [S, V])[targets [S]], in float32, a few rows at a time."""
    targets = targets.to(logits.device)
    chunks = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    return sum(functional.cross_entropy(rows.float(), row, reduction="sum").item() for rows, row in chunks)
