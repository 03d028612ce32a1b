"""A cache that is decoded through paged operators, for their tests: reference, CPU, in place over a file, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphwright.kernels import page_append, page_gather, page_recall, paged_attention
from graphwright.kernels.page_tables import empty_counts, empty_tables
from graphwright.kernels.retrieved_attention import retrieved_attention
from graphwright.kernels.slow_pool import open_pools

OPS = torch.ops.graphwright
WAYS: dict[str, tuple[Callable[..., Any], ...]] = {
    "reference": (page_append.reference, page_recall.reference, paged_attention.reference, page_gather.reference),
    "functional": (OPS.page_append, OPS.page_recall, OPS.paged_attention, OPS.page_gather),
    "in_place": (OPS.page_append_, OPS.page_recall_, OPS.paged_attention, OPS.page_gather),
}


@dataclass
class Text:
    """Queries [B, Hq, L, D] that turn slowly, keys and values [B, H, L, D], and how they are looked at."""

    query: Tensor
    key: Tensor
    value: Tensor
    starts: Tensor | None = None
    page: int = 8
    slots: int = 6
    sinks: int = 1
    window: int = 2
    tau: float = 0.8
    pooling: str = "mean_softmax"
    scaled: bool = False

    @property
    def length(self) -> int:
        """Tokens."""
        return self.query.shape[2]

    @property
    def scale(self) -> float:
        """Of scores."""
        return self.query.shape[-1] ** -0.5

    def oracle(self) -> Tensor:
        """What every way of decoding must give."""
        start = (torch.zeros_like(self.query[:, :, 0]), torch.zeros(1, dtype=torch.int64, device=self.query.device))
        return retrieved_attention(
            self.query, self.key, self.value, torch.arange(self.length, device=self.query.device), *start, self.starts,
            self.page, self.slots, self.sinks, self.window, self.tau, self.pooling, self.scaled, self.scale,
        )[0]  # fmt: skip


def text(batch: int = 2, heads: int = 2, group: int = 2, length: int = 128, dim: int = 16, **options: Any) -> Text:
    """A random one; the cosine of neighbouring queries is 0.8 in the mean."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads * group, length, dim, generator=generator)
    for i in range(1, length):
        query[:, :, i] = 0.8 * query[:, :, i - 1] + 0.6 * query[:, :, i]
    key, value = (torch.randn(batch, heads, length, dim, generator=generator) for _ in range(2))
    return Text(query, key, value, **options)


@dataclass
class Decoding:
    """A paged cache, and the operators that it goes through."""

    text: Text
    way: str = "functional"
    file: bool = False
    buffers: int = 2
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch, heads, length, dim = self.text.key.shape
        page, pages, device = self.text.page, -(-length // self.text.page), self.text.key.device
        empty = self.text.key.new_zeros
        slow = empty(batch, pages, heads, 2, page, dim)
        if self.file:
            self.pools = open_pools([slow.shape], [slow.dtype], buffers=self.buffers)
            slow = self.pools[0].slow
        elif device.type == "cuda":
            slow = torch.zeros(slow.shape, dtype=slow.dtype, pin_memory=True)
        self.state = {
            "fast": empty(batch, self.text.slots, 2, page, heads, dim),
            "slow": slow,
            "summary": empty(batch, heads, pages, 2, dim),
            "tables": empty_tables(batch, heads, self.text.slots, pages, device),
            "counts": empty_counts(device),
            "previous": torch.zeros_like(self.text.query[:, :, 0]),
        }

    def _update(self, names: str, values: tuple[Tensor, ...]) -> None:
        self.state |= dict(zip(names.split(), values, strict=True))

    def _of(self, names: str) -> list[Tensor]:
        return [self.state[name] for name in names.split()]

    def append(self, low: int, high: int) -> Tensor:
        """Append tokens low to high; their positions."""
        positions = torch.arange(low, high, device=self.text.key.device)
        names = "fast slow summary tables counts"
        new = self.text.key[:, :, low:high], self.text.value[:, :, low:high]
        rest = (self.text.starts, self.text.sinks, self.text.window)
        self._update(names, WAYS[self.way][0](*self._of(names), positions, *new, *rest))
        return positions

    def recall(self, low: int, high: int, *, ahead: bool) -> None:
        """Recall for the last of the queries low to high."""
        given = self.text
        positions = torch.arange(low, high, device=given.key.device)
        names = "fast tables previous counts"
        rest = (given.starts, given.sinks, given.window, given.tau, given.pooling, given.scaled, ahead)
        arguments = (*self._of(names), *self._of("slow summary"), given.query[:, :, low:high], positions, *rest)
        self._update(names, WAYS[self.way][1](*arguments))

    def step(self, i: int) -> Tensor:
        """Decode token i: its attention [B, Hq, 1, D]."""
        positions = self.append(i, i + 1)
        self.recall(i, i + 1, ahead=False)
        query = self.text.query[:, :, i : i + 1]
        y = WAYS[self.way][2](query, *self._of("fast tables"), positions, self.text.starts, self.text.scale)
        self.recall(i, i + 1, ahead=True)
        return y

    def several(self, low: int, high: int) -> None:
        """A prefill or an extension of tokens low to high."""
        self.append(low, high)
        self.recall(low, high, ahead=True)

    def gathered(self, newest: int) -> tuple[Tensor, Tensor]:
        """The whole cache after token `newest`."""
        positions = torch.tensor([newest], device=self.text.key.device)
        return WAYS[self.way][3](*self._of("slow fast tables"), positions, self.text.length)

    def run(self, prompt: int) -> Tensor:
        """Attention of all tokens after the prompt."""
        self.several(0, prompt)
        return torch.cat([self.step(i) for i in range(prompt, self.text.length)], 2)
