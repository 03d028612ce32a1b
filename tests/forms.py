"""One table of the forms that attention comes in; matchers and passes are tested on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

HEADS, KV_HEADS, SIZE = 4, 2, 8
WIDTH = HEADS * SIZE
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Form:
    """How one attention is written, and what must be found in it."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    kv_heads: int = HEADS
    mask: str = "none"
    decomposed: bool = False


def repeat(x: Tensor) -> Tensor:
    """transformers' repeat_kv."""
    batch, heads, tokens, size = x.shape
    groups = HEADS // heads
    return x[:, :, None].expand(batch, heads, groups, tokens, size).reshape(batch, HEADS, tokens, size)


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """Bool [queries, keys]."""
    return torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, upcast: bool = False) -> Tensor:
    """Attention spelled out, scale after the product."""
    scores = q @ k.transpose(2, 3) * SIZE**-0.5
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32 if upcast else None).to(q.dtype)
    return F.dropout(weights, 0.1, training=False) @ v


def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads folded into one dimension, scale on the query, as older models do."""
    batch, heads, tokens, size = q.shape
    folded = [x.reshape(batch * heads, -1, size) for x in (q * SIZE**-0.5, k, v)]
    weights = torch.bmm(folded[0], folded[1].transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, folded[2]).view(batch, heads, tokens, size)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """masked_fill with an inverted mask, scale as a division."""
    scores = (q @ k.transpose(-1, -2)) / SIZE**0.5
    return scores.masked_fill(~causal_mask(q, k), float("-inf")).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor) -> Tensor:
    """Slopes of heads times the index of each key, as Bloom has it: [batch * heads, 1, keys]."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    return (slopes[:, None] * torch.arange(k.shape[2])).repeat(q.shape[0], 1)[:, None]


def offset(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    addend: Callable[[Tensor, Tensor], Tensor] = alibi,
    mask: Callable[[Tensor, Tensor], Tensor] = lambda scores, keep: scores + torch.where(keep, 0.0, LOWEST),
) -> Tensor:
    """The product with an addend, batch and heads folded; then a mask over [batch, heads, queries, keys]."""
    batch, heads, tokens, size = q.shape
    folded = [x.reshape(batch * heads, -1, size) for x in (q, k, v)]
    scores = addend(q, k).baddbmm(folded[0], folded[1].transpose(1, 2), beta=1.0, alpha=SIZE**-0.5)
    weights = mask(scores.view(batch, heads, tokens, -1), causal_mask(q, k)).softmax(-1)
    return torch.bmm(weights.view(batch * heads, tokens, -1), folded[2]).view(batch, heads, tokens, size)


FORMS = [
    Form("sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
    Form("sdpa, causal flag", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), mask="causal"),
    Form(
        "sdpa, causal mask", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal_mask(q, k)), mask="causal"
    ),
    Form(
        "sdpa, repeated heads",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), causal_mask(q, k)),
        KV_HEADS,
        "causal",
    ),
    Form("sdpa, grouped", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), KV_HEADS),
    Form("eager", eager),
    Form("eager, upcast", lambda q, k, v: eager(q, k, v, upcast=True)),
    Form("eager, causal", lambda q, k, v: eager(q, k, v, causal_mask(q, k)), mask="causal"),
    Form(
        "eager, repeated heads",
        lambda q, k, v: eager(q, repeat(k), repeat(v), causal_mask(q, k), upcast=True),
        KV_HEADS,
        "causal",
    ),
    Form("masked_fill", filled, mask="causal"),
    Form("flat", flat),
    Form("decomposed sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), decomposed=True),
    Form("decomposed eager", lambda q, k, v: eager(q, k, v, causal_mask(q, k)), mask="causal", decomposed=True),
    Form(
        "decomposed sdpa, causal mask and repeated heads",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), causal_mask(q, k)),
        KV_HEADS,
        "causal",
        decomposed=True,
    ),
    Form("offset and masked", offset, mask="alibi"),
    Form(
        "offset and filled",
        lambda q, k, v: offset(q, k, v, mask=lambda scores, keep: scores.masked_fill(~keep, -1e9)),
        mask="alibi",
    ),
    Form("offset alone", lambda q, k, v: offset(q, k, v, mask=lambda scores, keep: scores), mask="unknown"),
    Form(
        "offset alike in all heads",
        lambda q, k, v: offset(q, k, v, lambda q, k: 0.5 * torch.arange(k.shape[2]).float()),
        mask="alibi",
    ),
    Form("offset of zero", lambda q, k, v: offset(q, k, v, lambda q, k: torch.zeros(1, 1, 1)), mask="causal"),
]


class Block(nn.Module):
    """Projections around one attention."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.kv_heads = kv_heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, kv_heads * SIZE)
        self.v = nn.Linear(WIDTH, kv_heads * SIZE)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, HEADS, SIZE).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, SIZE).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, SIZE).transpose(1, 2)
        y = self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        return self.o(y)


def exported(form: Form, dynamic: bool = True) -> ExportedProgram:
    """The form's block as a functional program, its token count dynamic."""
    shapes = ({1: Dim("tokens", min=2, max=64)},) if dynamic else None
    block = Block(form.attend, form.kv_heads).eval()
    program = export(block, (torch.randn(2, 6, WIDTH),), dynamic_shapes=shapes, strict=False)
    return program.run_decompositions() if form.decomposed else program.run_decompositions({})
