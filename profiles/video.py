"""What methods for video attention have in common: the grid, the dense steps, and which sites come into question.

A subclass says in `propose` what is to be done at the sites that are left: self-attention and joint attention over a
proved grid, in steps that are not dense. Everything else becomes a refusal with its reason.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from pydantic import Field

from ..kernels.block_sparse_attention import dense_is_faster
from ..passes.decision import Decision
from ..patterns.attention import AttentionSite
from ..patterns.find import Sites
from ..patterns.graph import GraphView, Refusal
from ..patterns.grid import find_grid
from ..patterns.nodes import shape_of
from ..patterns.steps import Schedule, StepRange
from ..patterns.video import VideoLayout, video_layout
from .method import Context, Method


@dataclass(frozen=True)
class Place:
    """A site that a video method may rewrite."""

    phase: str
    site: AttentionSite
    layout: VideoLayout

    @property
    def tokens(self) -> int | None:
        """Length of the sequence, None where it is dynamic."""
        return self.site.queries if isinstance(self.site.queries, int) else None


@dataclass(frozen=True)
class Proposal:
    """What a method wants at one place: a pass with its options, and the share of the score map that it computes.

    `saved` is the share of the attention's multiply-adds that is left out in another way than by density.
    """

    pass_name: str
    options: dict[str, Any]
    density: float | None
    figures: dict[str, Any] = field(default_factory=dict)
    saved: float | None = None


class VideoMethod(Method):
    """Base of the methods for video attention."""

    dense_steps: float = Field(0.1, ge=0, lt=1, description="Share of the steps at the beginning that run dense.")
    dense_tail: float = Field(0.0, ge=0, lt=1, description="Share of the steps at the end that run dense.")
    grid: tuple[int | None, int, int] | None = Field(
        None, description="Frames, height and width in tokens, where the graph does not prove them; None is dynamic."
    )
    block_size: Literal[64, 128] | None = Field(
        None, description="Tokens of a block of the sparse operator; by default 128 from 4096 tokens on, else 64."
    )

    @abstractmethod
    def propose(self, places: Sequence[Place], context: Context) -> Mapping[str, Proposal | str]:
        """Decide about the places that come into question.

        Args:
            places: Of all phases, in order of the phases and of the graph.
            context: The program.

        Returns:
            Site id -> the proposal, or the reason for none.
        """

    def edges(self, first: int, stop: int) -> tuple[int, ...]:
        """Steps between `first` and `stop` at which the decision changes."""
        return ()

    def schedule(self, steps: int) -> Schedule:
        """Active between the dense steps at the beginning and those at the end."""
        first, stop = round(self.dense_steps * steps), steps - round(self.dense_tail * steps)
        return Schedule(first, stop, self.edges(first, stop))

    def decide(self, context: Context) -> list[Decision]:
        """One decision an attention site."""
        places: list[Place] = []
        refused: dict[str, str] = {}
        for phase, sites in context.sites.items():
            reason = self._dense(context.steps.get(phase), context)
            view = GraphView(context.phases[phase])
            grid = self.grid or context.facts.get("grid") or find_grid(view)
            for site in sites.attention:
                alone = "cross-attention is left alone" if site.attention == "cross" else ""
                layout = alone or reason or video_layout(view, site, tuple(grid) if isinstance(grid, list) else grid)
                if isinstance(layout, str | Refusal):
                    refused[site.id] = str(layout)
                else:
                    places.append(Place(phase, site, layout))
        proposals = self.propose(places, context) if places else {}
        layouts = {place.site.id: place.layout for place in places}
        return [
            self._decision(site, sites, layouts.get(site.id), refused.get(site.id) or proposals[site.id], context.keep)
            for sites in context.sites.values()
            for site in sites.attention
        ]

    def block_of(self, tokens: int | None) -> int:
        """The block size for a sequence of so many tokens, None where the length is dynamic."""
        return self.block_size or (128 if tokens is not None and tokens >= _LONG else 64)

    def _dense(self, steps: StepRange | None, context: Context) -> str:
        if steps is None:
            return ""
        schedule = self.schedule(1 + max(known.last for known in context.steps.values()))
        if schedule.first <= steps.first and steps.last < schedule.stop:
            return ""
        return f"steps {steps.first} to {steps.last} run dense"

    def _decision(
        self, site: AttentionSite, sites: Sites, layout: VideoLayout | None, proposal: Proposal | str, keep: str
    ) -> Decision:
        facts = site.describe() | (layout.describe() if layout is not None else {})
        if isinstance(proposal, Proposal):
            reason = _faster_dense(site, proposal.density) if keep == "faster" else None
            options, name, figures = proposal.options, proposal.pass_name, proposal.figures
        else:
            reason, options, name, figures = proposal, {}, "", {}
        density = proposal.density if isinstance(proposal, Proposal) else None
        saved = proposal.saved if isinstance(proposal, Proposal) else None
        if density is not None:
            saved = 1 - density
        return Decision(
            site=site.id,
            method=self.name,
            pass_name=name,
            options=options,
            status="refused" if reason else "proposed",
            reason=reason or "",
            facts=facts | ({} if density is None else {"density": f"{density:.3f}"}),
            figures=figures,
            predicted_gain=None if saved is None else saved * _share(site, sites),
        )


_LONG = 4096
"""From this length on blocks of 128, as in the kernels of the papers; shorter sequences would be too coarse in them. At
4096 tokens of 48 channels on one core, density 0.6, blocks of 128 gave 1.2 to 1.5 times the dense speed, of 64 hardly
more than it.
"""


def _faster_dense(site: AttentionSite, density: float | None) -> str | None:
    if density is None or not (isinstance(site.queries, int) and isinstance(site.keys, int)):
        return None
    device = site.query.meta["val"].device.type
    return dense_is_faster(device, site.keys, density)


def _share(site: AttentionSite, sites: Sites) -> float:
    """The site's share of a phase's multiply-adds in attentions and linears; 0 where sizes are dynamic."""

    def attention(each: AttentionSite) -> int:
        batch = shape_of(each.query)[0]
        return 2 * batch * each.heads * each.queries * each.keys * each.head_dim

    try:
        linears = sum(prod(shape_of(each.input)) * each.out_features for each in sites.linear)
        total = sum(map(attention, sites.attention)) + linears
        return float(attention(site) / total)
    except (TypeError, RuntimeError):
        return 0.0
