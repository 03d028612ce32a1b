"""By what shall FreeKV choose pages? Hidden numbers, with pages chosen in the module itself.

Every head attends to as many pages at every step: the first, the last, and those that a choice ranks highest.

    bound     by the largest product that a key within a page's minimum and maximum can have, as `page_scores.py`
    mean      by the mean of a page's keys
    attention by the attention that the page really gets
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graphwright.benchmarks.passkey import Hidden, asked_before, hide
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.perplexity import read_text
from graphwright.kernels.page_scores import page_scores, summarize

PAGE, EDGE, CHOSEN, LENGTH = 32, 128, 24, 4096
"""Tokens of a page, of the first and of the last pages; pages that are chosen; tokens of a text: a quarter is seen."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHOICES = ("all", "bound", "mean", "attention")


class Chooser:
    """An attention function of transformers that lets single queries see chosen pages only, but in the first layer."""

    def __init__(self) -> None:
        self.choice = "all"
        self._dense = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        """As transformers calls it: query [1, Hq, N, D], key and value [1, H, L, D]."""
        if self.choice == "all" or query.shape[2] > 1 or module.layer_idx == 0:
            return self._dense(module, query, key, value, mask, **options)
        heads, length, dim = key.shape[1:]
        pages, last = length // PAGE, (length - EDGE) // PAGE
        candidates = torch.zeros(pages, dtype=torch.bool)
        candidates[EDGE // PAGE : last] = True
        scores = query.unflatten(1, (heads, -1)) @ key.unsqueeze(2).mT * dim**-0.5  # [1, H, G, 1, L]
        ranks = self._ranks(query, key[:, :, : pages * PAGE].unflatten(2, (pages, PAGE)), scores, candidates)
        seen = (~candidates).repeat(heads, 1).scatter(1, ranks.topk(CHOSEN, -1).indices, True)
        tokens = torch.cat((seen.repeat_interleave(PAGE, 1), torch.ones(heads, length - pages * PAGE).bool()), 1)
        weights = scores.masked_fill(~tokens[None, :, None, None], float("-inf")).softmax(-1)
        return (weights @ value.unsqueeze(2)).flatten(1, 2).transpose(1, 2).contiguous(), None

    def _ranks(self, query: Tensor, paged: Tensor, scores: Tensor, candidates: Tensor) -> Tensor:
        """What each page [H, P] is ranked by."""
        if self.choice == "attention":
            shares = scores.softmax(-1)[0, :, :, 0, : candidates.shape[0] * PAGE]
            return shares.unflatten(-1, (-1, PAGE)).sum(-1).mean(1).masked_fill(~candidates, -1.0)
        mean = paged.mean(-2)
        summary = summarize(paged) if self.choice == "bound" else torch.stack((mean, mean), -2)
        return page_scores(summary, query, candidates.view(1, 1, 1, -1))[0, :, 0]


def digits(model: Any, hidden: Hidden, cache: Any) -> int:
    """How many digits of the number are right, read and written token by token after a text that the cache holds."""
    logits = torch.empty(0)
    for token in hidden.question.split(1, 1):
        logits = model(token, past_key_values=cache).logits[0, -1]
    right = 0
    for wanted in hidden.answer:
        token = logits.argmax()
        right += int(token == wanted)
        logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
    return right


def main() -> None:
    """Print the digits that each choice finds at each depth."""
    chooser = Chooser()
    ALL_ATTENTION_FUNCTIONS["chosen_pages"] = chooser
    model = load_smollm2()
    model.set_attn_implementation("chosen_pages")
    for hidden in hide(load_tokenizer(), read_text("evaluation"), LENGTH, DEPTHS):
        text = asked_before(hidden)
        cache = DynamicCache()
        chooser.choice = "all"
        model(text.text, past_key_values=cache, logits_to_keep=1)
        for choice in CHOICES:
            chooser.choice = choice
            print(f"depth {text.depth}, {choice}: {digits(model, text, copy.deepcopy(cache))} of 5 digits", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
