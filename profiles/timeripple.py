"""TimeRipple (CVPR 2026): partial attention scores of neighbouring tokens that nearly agree are computed once.

A channel of a query or key whose value deviates by less than a threshold from its neighbour's, one frame, row or column
before, takes the neighbour's value. Nothing is dropped, so at the same share of arithmetic far less is lost than by
leaving scores out. The threshold grows with the step over a ramp; the first steps and the last one run dense.

What of the published saving is time: channel by channel (`granularity="element"`), as published, the saving is counted
arithmetic. A matrix product, and with it FlashAttention, cannot leave out single factors; the published latencies are
estimates from that count. What can be turned into time are whole tokens (`granularity="token"`): a query row or key
that stands for others is attended for once, and the time falls as (1 - rq) (1 - rk).

When it pays: videos of many frames and a fine grid, where neighbours are alike; more than ten steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..errors import InvalidArgument
from ..passes.reuse_scores import ReuseScores
from ..patterns.graph import GraphView, Refusal
from ..patterns.rope_groups import AXES, RopeGroup, rope_groups
from ..patterns.steps import DEFAULT_TIMESTEPS, Schedule
from .method import Context
from .reuse_thresholds import Counts, Watched, count_reuse, find_theta
from .video import Place, Proposal, VideoMethod

_STEPS = 50
"""Steps of the runs that the paper's ramp and dense steps are counted in."""
_PARTS = 4
"""Ranges into which a calibration cuts the steps: tokens come to agree less as the noise falls."""


class TimeRipple(VideoMethod):
    """Reuse partial scores of correlated tokens."""

    name: ClassVar[str] = "timeripple"
    reference: ClassVar[str] = "TimeRipple: arXiv 2511.12035"
    rewrites: ClassVar[str] = "video self-attention, scores of correlated tokens reused"

    theta: tuple[float, float] = Field(
        (0.2, 0.5), description="Threshold at the beginning of the ramp and from its end on; HunyuanVideo's."
    )
    ramp: tuple[int, int] = Field(
        (11, 21), description="Steps of a run of 50 between which the threshold grows; other lengths are scaled."
    )
    literal_eq4: bool = Field(
        False, description="The threshold as printed in the paper, which begins the ramp at 0 and jumps at its end."
    )
    saving: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Find thresholds that save this share of score arithmetic over the whole sampling, dense steps"
        " included, on calibration inputs; the first stays in its ratio to the second.",
    )
    granularity: Literal["element", "group", "token"] = Field(
        "token", description="What shares a flag: a channel (as published), a rotary group, or a whole token."
    )
    window: int = Field(2, ge=2, description="Tokens of a window along an axis.")
    axes: Literal["t", "h", "w", "th", "tw", "hw", "thw"] = Field("thw", description="Along which axes to reuse.")
    channels: tuple[int, int, int] | None = Field(
        None, description="Channels of a head that turn with t, h and w, where the graph does not prove them."
    )
    factors: tuple[float, float, float] = Field(
        (1.0, 1.0, 1.0), description="What thresholds are multiplied with in the channels of t, h and w."
    )
    dense_steps: float = Field(0.2, ge=0, lt=1, description="Share of the steps at the beginning that run dense.")
    dense_tail: float = Field(
        0.02, ge=0, lt=1, description="Share of the steps at the end that run dense, one at least where it is not 0."
    )

    @field_validator("theta")
    @classmethod
    def _growing(cls, theta: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= theta[0] <= theta[1] or not math.isfinite(theta[1]):
            raise ValueError(f"thresholds must grow with the step, got {theta[0]:g} and then {theta[1]:g}")
        return theta

    @field_validator("ramp")
    @classmethod
    def _rising(cls, ramp: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= ramp[0] < ramp[1]:
            raise ValueError(f"a ramp must end after it begins, got {ramp[0]} to {ramp[1]}")
        return ramp

    @field_validator("factors")
    @classmethod
    def _not_negative(cls, factors: tuple[float, float, float]) -> tuple[float, float, float]:
        if any(factor < 0 or not math.isfinite(factor) for factor in factors):
            raise ValueError(f"factors must be finite and not negative, got {factors}")
        return factors

    def schedule(self, steps: int) -> Schedule:
        """Active between the dense steps.

        Raises:
            InvalidArgument: A run of so many steps has none left between them.
        """
        first, tail = round(self.dense_steps * steps), round(self.dense_tail * steps)
        stop = steps - max(tail, 1 if self.dense_tail else 0)
        if first >= stop:
            raise InvalidArgument(
                f"a run of {steps} steps has none left for TimeRipple: {first} run dense at the beginning and"
                f" {steps - stop} at the end; it needs more steps, or smaller dense_steps and dense_tail"
            )
        return Schedule(first, stop, self.edges(first, stop))

    def edges(self, first: int, stop: int) -> tuple[int, ...]:
        """A calibration looks at several ranges of steps, since the tokens' deviations change."""
        if self.saving is None:
            return ()
        return tuple(sorted({first + (stop - first) * part // _PARTS for part in range(1, _PARTS)} - {first}))

    def thresholds(self, steps: int, theta: tuple[float, float] | None = None) -> list[float]:
        """The threshold of each step of a run, dense ones included, for which it plays no part.

        Source: equation 4 of the paper, to which the beginning of the ramp was added: as printed it is 0 there.
        """
        low, high = theta or self.theta
        begin, end = (step * steps / _STEPS for step in self.ramp)
        found = []
        for step in range(steps):
            part = min(max((step - begin) / (end - begin), 0.0), 1.0)
            rises = part * (high - low)
            found.append(high if part == 1 else rises if self.literal_eq4 else low + rises)
        return found

    def propose(self, places: Sequence[Place], context: Context) -> Mapping[str, Proposal | str]:
        """One schedule of thresholds for all places; the groups of channels are each place's own."""
        views = {phase: GraphView(exported) for phase, exported in context.phases.items()}
        groups = {place.site.id: self._groups(views[place.phase], place) for place in places}
        timesteps = context.facts.get("timesteps") or DEFAULT_TIMESTEPS
        theta, counts = self.theta, dict[str, list[Counts]]()
        if self.saving is not None:
            counts = self._count(places, groups, context)
            theta = self._calibrate(places, counts, context, len(timesteps))
            context.measured["timeripple"] = {"theta": list(theta), "saving": self.saving}
        thresholds = self.thresholds(len(timesteps), theta)
        by_step: dict[str, Any] = {"thetas": [theta[1]]}
        if context.facts.get("timestep"):
            edges = [(a + b) / 2 for a, b in pairwise(timesteps)]
            by_step = {"thetas": thresholds, "edges": edges, "timestep": context.facts["timestep"]}
        answers: dict[str, Proposal | str] = {}
        for place in places:
            found = groups[place.site.id]
            if isinstance(found, str):
                answers[place.site.id] = found
                continue
            layout = place.layout
            frames = layout.frames if isinstance(layout.frames, int) else None
            options = {
                "grid": [frames, layout.height, layout.width],
                **by_step,
                **self._snapping(found),
                "collapse": self.granularity == "token",
            }
            known = counts.get(place.site.id)
            middle = thresholds[context.steps[place.phase].middle] if place.phase in context.steps else theta[1]
            saved = sum(each.saving(middle) for each in known) / len(known) if known else None
            figures = {"groups": [group.axis for group in found]}
            answers[place.site.id] = Proposal(ReuseScores.name, options, None, figures, saved)
        return answers

    def _snapping(self, groups: Sequence[RopeGroup]) -> dict[str, Any]:
        factors = dict(zip(AXES, self.factors, strict=True))
        return {
            "groups": [group.channels for group in groups],
            "factors": [factors.get(group.axis, 1.0) for group in groups],
            "axes": [AXES.index(axis) for axis in self.axes],
            "window": self.window,
            "granularity": self.granularity,
        }

    def _groups(self, view: GraphView, place: Place) -> list[RopeGroup] | str:
        """Groups as given, as proved, or all channels in one where nothing depends on them."""
        if self.channels is not None:
            if sum(self.channels) != place.site.head_dim or min(self.channels) < 0:
                return f"channels {self.channels} are not the {place.site.head_dim} of a head"
            return [RopeGroup(a, size) for a, size in zip(AXES, self.channels, strict=True) if size]
        found = rope_groups(view, place.site, place.layout)
        if not isinstance(found, Refusal):
            return list(found)
        if self.granularity == "group" or len(set(self.factors)) > 1:
            return f"the channels of t, h and w are not known, give channels=(t, h, w): {found}"
        return [RopeGroup("other", place.site.head_dim)]

    def _count(
        self, places: Sequence[Place], groups: Mapping[str, list[RopeGroup] | str], context: Context
    ) -> dict[str, list[Counts]]:
        watched: dict[str, list[Watched]] = defaultdict(list)
        for place in places:
            found, layout = groups[place.site.id], place.layout
            if isinstance(found, str):
                continue
            if not isinstance(layout.frames, int):
                raise InvalidArgument("a saving is calibrated on a static grid: capture at the size that it runs at")
            options = self._snapping(found) | {
                "frames": layout.frames, "height": layout.height, "width": layout.width, "first": int(layout.first)
            }  # fmt: skip
            watched[place.phase].append(Watched(place.site, options))
        runs = [(phase, flat) for phase in watched for flat in context.calibration.get(phase, ())]
        if watched and not runs:
            raise InvalidArgument(
                "TimeRipple finds the thresholds of a saving on calibration inputs, and there are none"
            )
        counts: dict[str, list[Counts]] = defaultdict(list)
        with context.progress.stage("deviations of tokens", sum(len(watched[phase]) for phase, _ in runs)):
            for phase, flat in runs:
                made = count_reuse(context.phases[phase], watched[phase], flat, context.progress.step)
                for site, each in made.items():
                    counts[site].append(each)
        return counts

    def _calibrate(
        self, places: Sequence[Place], counts: Mapping[str, Sequence[Counts]], context: Context, steps: int
    ) -> tuple[float, float]:
        """Thresholds that save `saving` of the arithmetic of all steps, at the sites that are rewritten."""
        ratio = self.theta[0] / self.theta[1] if self.theta[1] else 1.0
        by_phase: dict[str, list[Counts]] = defaultdict(list)
        for place in places:
            by_phase[place.phase] += counts.get(place.site.id, ())
        ranges = [(by_phase[known.name], known) for known in context.steps.values() if by_phase.get(known.name)]
        whole = [(each, None) for each in by_phase.values()] if not context.steps else []

        def saving(high: float) -> float:
            thresholds = self.thresholds(steps, (ratio * high, high))
            total = 0.0
            for found, known in ranges:
                for step in known.steps:
                    total += sum(each.saving(thresholds[step]) for each in found) / len(found)
            for found, _ in whole:
                total += steps / len(whole) * sum(each.saving(high) for each in found) / len(found)
            return total / steps

        assert self.saving is not None
        high = find_theta(saving, self.saving)
        return ratio * high, high
