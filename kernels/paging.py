"""Which pages of a key-value cache a decode step may look at: sinks, the recent window, and candidates for the rest.

A page is `page` consecutive tokens. At position i (the newest token's) the current page is c = i // page, and page j of
a sequence that begins in page a (0, or that of its first token where the batch is padded on the left) is

    a sink        if a <= j < a + sinks
    recent        if c - window < j <= c                the current page, which is being filled, is one of them
    a candidate   if a + sinks <= j <= c - window       complete, so its summary and its copy in the slow pool are final

A step looks at sinks, recent pages and `chosen` candidates of each head, at most `slots` pages together. While there
are no more candidates than that, it looks at everything.

Source: FreeKV (Liu et al. 2025, arXiv 2505.13109), section 4; whole pages make the recent window float by up to a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidArgument


@dataclass(frozen=True)
class Paging:
    """How a cache is cut into pages and how many of them are kept at hand.

    Attributes:
        page: Tokens of a page.
        slots: Pages that the fast pool holds, for each head.
        sinks: First pages of a sequence, always at hand.
        window: Last pages, the current one included, always at hand.
    """

    page: int
    slots: int
    sinks: int
    window: int

    def refuse(self) -> str | None:
        """Why this cannot be, None where it can."""
        if self.page < 1 or self.sinks < 0 or self.window < 1:
            return f"got page={self.page}, sinks={self.sinks}, window={self.window}, expected at least 1, 0 and 1"
        if self.chosen < 1:
            return f"{self.slots} pages at hand leave none to choose beside {self.sinks} sinks and {self.window} recent"
        return None

    def require(self) -> None:
        """`refuse`, with the reason raised as `InvalidArgument`."""
        if (reason := self.refuse()) is not None:
            raise InvalidArgument(f"paged cache: {reason}")

    @property
    def chosen(self) -> int:
        """Pages that are chosen among the candidates."""
        return self.slots - self.sinks - self.window

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page)

    def first_pages(self, starts: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """The page [B] that each sequence begins in, from the position [B] of its first token."""
        return torch.zeros(batch, dtype=torch.int64, device=device) if starts is None else starts // self.page

    def always(self, position: int | Tensor, first: Tensor, pages: int) -> Tensor:
        """Sinks and recent pages: bool [B, ..., pages] at a position (or positions [...]) for first pages [B]."""
        j, first, current = self._at(position, first, pages)
        sink = (j >= first) & (j < first + self.sinks)
        recent = (j > current - self.window) & (j >= first)
        return (sink | recent) & (j <= current)

    def candidates(self, position: int | Tensor, first: Tensor, pages: int) -> Tensor:
        """Pages that may be chosen: bool [B, ..., pages], likewise."""
        j, first, current = self._at(position, first, pages)
        return (j >= first + self.sinks) & (j <= current - self.window)

    def _at(self, position: int | Tensor, first: Tensor, pages: int) -> tuple[Tensor, Tensor, Tensor]:
        j = torch.arange(pages, device=first.device)
        current = torch.as_tensor(position, device=first.device) // self.page
        return j, first.view(-1, *(1,) * current.dim(), 1), current[..., None]


def sizes_of(fast: Tensor, sinks: int, window: int) -> Paging:
    """The paging of a fast pool [B, slots, 2, page, H, D]."""
    return Paging(page=int(fast.shape[3]), slots=int(fast.shape[1]), sinks=sinks, window=window)
