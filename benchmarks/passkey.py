"""Passkey retrieval: five digits hidden in a long text, and whether a program still finds them.

A text of real prose of N tokens says a number once, at some depth. The text is read first, as a prefill; the question
comes afterwards, as an extension of the cache, so that what a method dropped of the cache it has to answer without.

Source: the task is Mohtashami and Jaggi 2023 (arXiv 2305.16300); prose in place of their one repeated sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import graphwright as gw

HEAD = "There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it.\n"
NEEDLE = "\nThe pass key is {0}. Remember it. {0} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
DIGITS = 5


class Hidden(NamedTuple):
    """One text with a number in it.

    Attributes:
        depth: Where it is, 0 the beginning and 1 the end.
        text: Tokens [1, N - Q - A].
        question: Tokens [1, Q].
        answer: Tokens [A], a digit each.
    """

    depth: float
    text: Tensor
    question: Tensor
    answer: Tensor


def hide(tokenizer: Any, prose: str, length: int, depths: Sequence[float], seed: int = 0) -> Iterator[Hidden]:
    """Texts that take `length` tokens together with question and answer, one a depth.

    Args:
        tokenizer: Of the model.
        prose: What the number is hidden in; a random part of it is taken.
        length: N, tokens.
        depths: Of the number.
        seed: Of numbers and parts.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    filler, head, question = ids(prose), ids(HEAD), ids(QUESTION)
    for depth in depths:
        digits = "".join(str(int(d)) for d in torch.randint(10, (DIGITS,), generator=generator))
        needle, answer = ids(NEEDLE.format(digits)), ids(digits)
        room = length - sum(map(len, (head, needle, question, answer)))
        start = int(torch.randint(len(filler) - room, (1,), generator=generator))
        before = int(depth * room)
        body = filler[start : start + room]
        text = [*head, *body[:before], *needle, *body[before:]]
        yield Hidden(depth, torch.tensor([text]), torch.tensor([question]), torch.tensor(answer))


def asked_before(hidden: Hidden, left: int = 2) -> Hidden:
    """The same with the question in the text that is read first, but for its last tokens."""
    cut = hidden.question.shape[1] - left
    text = torch.cat((hidden.text, hidden.question[:, :cut]), 1)
    return hidden._replace(text=text, question=hidden.question[:, cut:])


def read(program: gw.Program, hidden: Hidden) -> None:
    """Fill a program's cache with a text."""
    program.reset()
    program(hidden.text, torch.arange(hidden.text.shape[1]))


def answered(program: gw.Program, hidden: Hidden, *, by_token: bool = False) -> list[bool]:
    """Which digits of the number a program that has read the text writes where they belong, greedily.

    The question is read at once, or, `by_token`, as if it were generated.
    """
    pieces = hidden.question.split(1 if by_token else hidden.question.shape[1], 1)
    position = hidden.text.shape[1]
    for piece in pieces[:-1]:
        program(piece, torch.arange(position, position + piece.shape[1]))
        position += piece.shape[1]
    logits = program(pieces[-1], torch.arange(position, position + pieces[-1].shape[1]))
    position += pieces[-1].shape[1]
    right = []
    for wanted in hidden.answer:
        token = logits[:, -1].argmax(-1, keepdim=True)
        right.append(bool(token == wanted))
        logits = program(token, torch.tensor([position]))
        position += 1
    return right


def found(program: gw.Program, texts: Sequence[Hidden]) -> tuple[float, float]:
    """The shares of texts whose number was found whole, and of digits."""
    right = []
    for text in texts:
        read(program, text)
        right.append(answered(program, text))
    return shares(right)


def shares(right: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """The shares of texts whose digits are all right, and of digits."""
    digits = [digit for each in right for digit in each]
    return sum(map(all, right)) / len(right), sum(digits) / len(digits)
