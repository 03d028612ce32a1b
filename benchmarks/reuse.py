"""Reuse in the small Wan model: TimeRipple's curves and ablations, ASTRAEA's budgets, search, time and memory.

One function for each part of the table (`reuse_table.py`). Quality is PSNR and SSIM against the dense program's video
of the same prompt and seed; a saving is of the score arithmetic over the whole sampling, dense steps included.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.timing import interleaved
from graphwright.benchmarks.video import Setting
from graphwright.inputs import CallSignature
from graphwright.kernels.collapsed_attention import collapsed_attention
from graphwright.passes.base import SitePass
from graphwright.passes.edit import Edit
from graphwright.patterns.attention import AttentionSite
from graphwright.patterns.nodes import aten
from graphwright.profiles.reuse_figures import ReuseByStep, channel_groups, reuse_figures
from graphwright.profiles.search_budgets import (
    FULL,
    Limits,
    evaluations,
    random_table,
    search_budgets,
    skipped_table,
    uniform_table,
)
from graphwright.profiles.video import Place, Proposal, VideoMethod
from graphwright.progress import Progress
from graphwright.quality import compare
from graphwright.step_trials import StepTrials

# ---- TimeRipple


def counted(setting: Setting, program: gw.Program) -> tuple[Tensor, dict[str, Any]]:
    """A video, and what was reused in each step of it."""
    by_step, groups = ReuseByStep(), channel_groups(program.decisions)

    def denoise(**called: Any) -> Any:
        _, phase, flat = program.dispatch(**called)
        exported = program.phases[phase].exported
        figures, outputs = reuse_figures(exported, flat, groups)
        by_step.add(float(called["timestep"][0]), figures)
        return CallSignature(exported, program.inputs).unflatten(outputs)

    return setting.sample(denoise), by_step.summary()


def ripple(setting: Setting, method: gw.TimeRipple) -> dict[str, Any]:
    """Saving, thresholds and quality of one setting of TimeRipple."""
    program = setting.optimize(method)
    video, reuse = counted(setting, program)
    theta = program.profile.measured.get("timeripple", {}).get("theta", list(method.theta))
    return {**compare(setting.reference, video), "saving": reuse["saving"], "theta": theta, "steps": reuse["steps"]}


def masked(setting: Setting, saving: float, dense_steps: float) -> dict[str, Any]:
    """Quality where the smallest values of queries and keys are left out, as many as give the saving."""
    schedule = gw.TimeRipple(dense_steps=dense_steps).schedule(setting.steps)
    active = (schedule.stop - schedule.first) / setting.steps
    share = 1 - (1 - saving / active) ** 0.5
    method = MaskLowValues(dense_steps=dense_steps, dense_tail=1 / setting.steps, share=share)
    video = setting.sample(setting.optimize(method))
    return compare(setting.reference, video) | {"saving": saving}


def saving_curve(setting: Setting, savings: Mapping[float, float]) -> dict[str, Any]:
    """TimeRipple by element and masking at equal savings.

    Args:
        setting: The model.
        savings: The saving -> the share of steps that run dense first; a high one leaves no room for many.
    """
    found: dict[str, Any] = {}
    for saving, dense in savings.items():
        method = gw.TimeRipple(saving=saving, granularity="element", dense_steps=dense)
        reused = ripple(setting, method)
        found[f"{saving:.0%}"] = {"reuse": reused, "mask": masked(setting, reused["saving"], dense)}
    return found


def ablations(setting: Setting, saving: float) -> dict[str, Any]:
    """The paper's ablations by element: schedule, axes, window and granularity, all at one saving."""
    options: dict[str, dict[str, Any]] = {
        "as published": {},
        "one threshold in all steps": {"theta": (0.5, 0.5)},
        "t alone": {"axes": "t"},
        "h and w": {"axes": "hw"},
        "window 4": {"window": 4},
        "by group": {"granularity": "group"},
        "by token": {"granularity": "token"},
    }
    found = {}
    for name, changed in options.items():
        found[name] = ripple(setting, gw.TimeRipple(**{"saving": saving, "granularity": "element", **changed}))
    return found


def forced(setting: Setting) -> dict[str, Any]:
    """Reuse from the frame before in all rotary channels of one axis and in no others, whatever they hold."""
    found, large = {}, (1e9, 1e9)
    for place, axis in enumerate("thw"):
        factors = tuple(float(number == place) for number in range(3))
        method = gw.TimeRipple(theta=large, axes="t", factors=factors, granularity="element")
        found[f"forced: channels of {axis}"] = ripple(setting, method)
    return found


def collapse(tokens: int, shares: Sequence[float], rounds: int = 5) -> list[dict[str, float]]:
    """Time of collapsed attention against dense attention and against the ideal, one head of 64 channels."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, tokens, 64, generator=generator)
    rows = []
    for share in shares:
        roots = torch.arange(tokens, dtype=torch.int32)
        for start in range(0, tokens, 8):  # of each eight tokens so many take the first one's place
            roots[start + 8 - round(8 * share) : start + 8] = start
        roots = roots.expand(1, 1, -1).contiguous()
        seconds = interleaved(
            {
                "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
                "collapsed": lambda roots=roots: collapsed_attention(q, k, v, roots, roots),
            },
            rounds,
        )
        left = float((roots == torch.arange(tokens)).float().mean()) ** 2
        took = seconds["collapsed"] / seconds["dense"]
        rows.append({"left": left, "time": took, "of ideal": took / left})
    return rows


@dataclass(frozen=True)
class MaskSmall(SitePass[AttentionSite]):
    """Zeros for the smallest values of each head's queries and keys: what reuse is compared with."""

    name: ClassVar[str] = "mask_small"

    share: float = 0.5

    def guard(self, site: AttentionSite, edit: Edit) -> str | None:
        """Any attention of static size."""
        return None if isinstance(site.queries, int) else "needs a static size"

    def rewrite(self, site: AttentionSite, edit: Edit) -> None:
        """The threshold is the value below which the share lies, head by head."""
        operands = []
        for x in (site.query, site.key):
            batch, heads, tokens, channels = x.meta["val"].shape
            size = edit.call(aten.abs.default, x, like=site.node)
            flat = edit.call(aten.reshape.default, size, [batch, heads, tokens * channels], like=site.node)
            place = max(1, round(self.share * tokens * channels))
            limit = edit.call(aten.kthvalue.default, flat, place, -1, like=site.node)
            limit = edit.call(operator.getitem, limit, 0, like=site.node)
            limit = edit.call(aten.reshape.default, limit, [batch, heads, 1, 1], like=site.node)
            small = edit.call(aten.le.Tensor, size, limit, like=site.node)
            operands.append(edit.call(aten.masked_fill.Scalar, x, small, 0.0, like=site.node))
        rest, named = site.node.args[2:], dict(site.node.kwargs)
        edit.replace(site.node, edit.call(site.node.target, *operands, *rest, **named, like=site.node))


class MaskLowValues(VideoMethod):
    """Leave small values out, in the steps in which TimeRipple would reuse."""

    name: ClassVar[str] = "mask_low_values"
    reference: ClassVar[str] = "the baseline of benchmarks/reuse.py"
    rewrites: ClassVar[str] = "video self-attention, small values left out"

    share: float = Field(0.5, gt=0, lt=1, description="Share of the values of queries, and of keys, to leave out.")

    def propose(self, places: Sequence[Place], context: Any) -> Mapping[str, Proposal | str]:
        """The same everywhere."""
        return {place.site.id: Proposal(MaskSmall.name, {"share": self.share}, None) for place in places}


# ---- ASTRAEA


def budgets(setting: Setting, table: Sequence[int]) -> dict[str, Any]:
    """A searched table against others of its total: uniform, whole steps skipped, other tokens, other keys."""
    share = sum(table) / len(table) / FULL
    uniform = uniform_table(len(table), share)
    methods = {
        "searched": gw.Astraea(table=tuple(table)),
        "searched, residual": gw.Astraea(table=tuple(table), residual=True),
        "uniform": gw.Astraea(table=uniform),
        "steps skipped": gw.Astraea(table=skipped_table(len(table), sum(table))),
        "steps skipped, residual": gw.Astraea(table=skipped_table(len(table), sum(table)), residual=True),
        "fixed tokens": gw.Astraea(table=uniform, tokens="fixed"),
        "fixed tokens, searched": gw.Astraea(table=tuple(table), tokens="fixed"),
        "queries and keys": gw.Astraea(table=uniform, keys="selected"),
        "queries and keys, searched": gw.Astraea(table=tuple(table), keys="selected"),
        "change alone": gw.Astraea(table=tuple(table), penalty=0.0),
    }
    found = {}
    for name, method in methods.items():
        program = gw.optimize(setting.captured, methods=[method], progress=False)
        found[name] = compare(setting.reference, setting.sample(program))
    return found


def sampling_time(setting: Setting, table: Sequence[int], rounds: int = 2) -> dict[str, float]:
    """Seconds of whole samplings in turn, and the state in bytes."""
    method = gw.Astraea(table=tuple(table))
    program = gw.optimize(setting.captured, methods=[method], progress=False)
    programs = {"dense": setting.dense, "astraea": program}
    seconds = interleaved({n: lambda p=p: setting.sample(p) for n, p in programs.items()}, rounds, warmup=0)
    return {**seconds, "speedup": seconds["dense"] / seconds["astraea"], "state bytes": program.state_bytes()}


def searched(setting: Setting, study: Path | None = None, **options: Any) -> dict[str, Any]:
    """The whole search, its seconds and its table."""
    started = time.perf_counter()
    method = gw.Astraea(study=study, **options)
    program = gw.optimize(setting.captured, methods=[method], calibration=setting.samplers(), progress=False)
    tried = evaluations(setting.steps, method.parents, method.children, method.generations)
    return {
        "seconds": time.perf_counter() - started,
        "evaluations": tried,
        "table": program.profile.measured["astraea"]["table"],
        "video": program.history.measured["video"],
    }


def against_random(setting: Setting, seeds: Sequence[int], budget: float, **size: int) -> list[dict[str, float]]:
    """The best error that the search finds, and that random tables of the same number have, for each seed."""
    levels = {f"level_{level}": level for level in range(FULL + 1)}
    trials = StepTrials(setting.captured, setting.samplers(), Progress(False))
    method = gw.Astraea(plan="uniform", budget=budget)
    variants = trials.variants(list(levels), lambda context: method.decide_levels(context, levels))
    whole = variants.sample([f"level_{FULL}"] * setting.steps)
    known: dict[tuple[int, ...], float] = {}

    def error(table: tuple[int, ...]) -> float:
        if table not in known:
            found = variants.sample([f"level_{level}" for level in table])
            errors = [torch.nn.functional.mse_loss(a.double(), b.double()) for a, b in zip(found, whole, strict=True)]
            known[table] = float(torch.stack(errors).mean())
        return known[table]

    limits = Limits.of(setting.steps, budget, method.slack)
    rows = []
    for seed in seeds:
        best = search_budgets(error, limits, seed=seed, **size)[0][1]
        rng = np.random.default_rng(1000 + seed)
        tried = evaluations(setting.steps, **size)
        chance = min(error(random_table(limits, rng)) for _ in range(tried))
        uniform = error(uniform_table(setting.steps, budget))
        rows.append({"seed": seed, "search": best, "random": chance, "uniform": uniform, "evaluations": tried})
    return rows
