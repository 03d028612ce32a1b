"""ASTRAEA (ICLR 2026): tokens that changed little from step to step keep what the blocks made of them before.

In each step every block computes only the tokens that score highest: by how much they changed, by how much attention
they spread (the log-sum-exp of the step before), and by how long they have waited. All keys and values are computed, so
attention of a computed token is exact. How many tokens a step computes is its budget, searched offline under a total by
an evolutionary search (`search_budgets.py`); step 0 is whole, a step of budget 0 gives the output of the one before.

When it pays: runs of some tens of steps, any number of tokens; the time of a step falls nearly with its budget. It
costs one tensor of tokens a block, for each guidance branch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch.nn import functional

from ..errors import InvalidArgument
from ..passes.decision import Decision
from ..passes.edit import Edit
from ..passes.select_tokens import LEVELS, SelectTokens
from ..patterns.block_site import BlockSite
from ..patterns.find import Sites
from ..patterns.graph import GraphView, Refusal
from ..patterns.grid import find_grid
from ..patterns.steps import Schedule
from ..patterns.video import video_layout
from .method import Context, Method
from .search_budgets import FULL, Limits, Table, evaluations, search_budgets, uniform_table

_WHOLE = "whole"


class Astraea(Method):
    """Compute the tokens that changed, by budgets searched for each step."""

    name: ClassVar[str] = "astraea"
    reference: ClassVar[str] = "ASTRAEA: arXiv 2506.05096"
    rewrites: ClassVar[str] = "video transformer blocks, tokens that changed"

    budget: float = Field(0.5, gt=0, le=1, description="Share of the tokens that is computed, mean over all steps.")
    plan: Literal["searched", "uniform"] = Field(
        "searched", description="Search the steps' budgets on calibration samplers, or give all steps the same."
    )
    table: tuple[int, ...] | None = Field(
        None, description="Tenths of the tokens in each step, the first 10: a table that is known needs no search."
    )
    generations: int = Field(30, ge=1, description="Generations of the search.")
    parents: int = Field(50, ge=2, description="Tables that a generation keeps.")
    children: int = Field(30, ge=2, description="Tables that a generation tries.")
    slack: tuple[float, float] = Field(
        (0.9, 1.0), description="Between which shares of the budget a searched table may be; 0.9 and 1.1 in the paper."
    )
    penalty: float = Field(0.5, ge=0, description="Weight of the exponential of the steps that a token has waited.")
    normalise: bool = Field(
        True, description="Divide the score of change by its mean over the tokens; the paper's formula does not."
    )
    residual: bool = Field(
        False, description="Tokens that are not computed keep what the block added to them, not what it gave."
    )
    tokens: Literal["score", "fixed"] = Field(
        "score", description="Which tokens: those that score highest, or always the same (the paper's ablation)."
    )
    keys: Literal["all", "selected"] = Field(
        "all", description="Which keys and values: all, or of the same tokens only (the paper's ablation)."
    )
    grid: tuple[int | None, int, int] | None = Field(
        None, description="Frames, height and width in tokens, where the graph does not prove them."
    )
    seed: int = Field(0, ge=0, description="Of the search.")
    study: Path | None = Field(
        None, exclude=True, description="File that keeps the search: it goes on from there, and processes can share it."
    )

    @field_validator("table")
    @classmethod
    def _tenths(cls, table: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if table is not None and (not table or table[0] != FULL or not all(0 <= level <= FULL for level in table)):
            raise ValueError(f"a table holds 0 to {FULL} tenths a step, {FULL} in the first, got {list(table)}")
        return table

    @field_validator("slack")
    @classmethod
    def _around_one(cls, slack: tuple[float, float]) -> tuple[float, float]:
        if not 0 < slack[0] <= slack[1]:
            raise ValueError(f"slack is a lower and an upper share of the budget, got {slack}")
        return slack

    def search_steps(self, trials: Any) -> Astraea:
        """Search the table, which says which steps share a phase.

        Raises:
            InvalidArgument: The model is no denoiser, a block cannot be rewritten, or there are no samplers.
        """
        if trials.captured.kind != "denoiser":
            raise InvalidArgument(
                f"ASTRAEA follows the steps of a denoiser, this is a {trials.captured.kind}: use capture_denoiser"
            )
        if self.table is not None or self.plan == "uniform":
            return self
        steps = len(trials.timesteps)
        limits = Limits.of(steps, self.budget, self.slack)
        total = evaluations(steps, self.parents, self.children, self.generations)
        levels = {f"level_{level}": level for level in range(LEVELS + 1)}
        names = [_WHOLE, *levels]
        with trials.progress.stage("blocks for each budget"):
            variants = trials.variants(names, lambda context: self.decide_levels(context, {_WHOLE: LEVELS, **levels}))
        failed = [d.reason for d in variants.program.decisions if d.status != "kept"]
        if failed or not variants.program.decisions:
            raise InvalidArgument(f"ASTRAEA finds no block that it can rewrite: {(failed or ['there is none'])[0]}")
        whole = variants.sample([f"level_{LEVELS}"] * steps)

        def evaluate(table: Table) -> float:
            found = variants.sample([_WHOLE, *(f"level_{level}" for level in table[1:])])
            errors = [functional.mse_loss(a.double(), b.double()) for a, b in zip(found, whole, strict=True)]
            return float(torch.stack(errors).mean())

        mark = hashlib.sha256()
        for video in whole:
            mark.update(video.cpu().contiguous().view(-1).to(torch.float32).numpy().tobytes())
        options = self.model_dump(mode="json", include={"penalty", "normalise", "residual", "tokens", "keys"})
        with trials.progress.stage("search of budgets", total):
            found = search_budgets(
                evaluate,
                limits,
                parents=self.parents,
                children=self.children,
                generations=self.generations,
                seed=self.seed,
                study=self.study,
                mark=f"{mark.hexdigest()} {options}",
                on_step=trials.progress.step,
            )
        return self.model_copy(update={"table": found[0][0]})

    def budgets(self, steps: int) -> Table:
        """The table of a run.

        Raises:
            InvalidArgument: The run has one step only, or the table is that of another number of steps.
        """
        if steps < 2:
            raise InvalidArgument(f"a run of {steps} step has none that could build on another: ASTRAEA needs two")
        if self.table is None:
            return uniform_table(steps, self.budget)
        if len(self.table) != steps:
            raise InvalidArgument(
                f"a table of {len(self.table)} steps for a run of {steps}: capture with the timesteps of the search"
            )
        return self.table

    def schedule(self, steps: int) -> Schedule:
        """Active after the first step; steps of one budget share a phase."""
        return Schedule(1, steps, (), self.budgets(steps))

    def decide(self, context: Context) -> list[Decision]:
        """One decision a block and phase."""
        if not context.steps:
            raise InvalidArgument("ASTRAEA follows the steps of a denoiser: use capture_denoiser")
        table = self.budgets(1 + max(max(known.steps) for known in context.steps.values()))
        context.measured["astraea"] = {"table": list(table), "budget": sum(table) / len(table) / FULL}
        return self.decide_levels(context, {name: table[known.first] for name, known in context.steps.items()})

    def decide_levels(self, context: Context, budgets: Mapping[str, int]) -> list[Decision]:
        """One decision a block and phase, of the phase's budget in tenths."""
        decisions = []
        for phase, sites in context.sites.items():
            view = GraphView(context.phases[phase])
            blocks, refused = self._video_blocks(view, sites, context)
            decisions += [self._refused(block, reason) for block, reason in refused]
            for number, block in enumerate(blocks):
                before = blocks[number - 1].place if number and blocks[number - 1].node is block.entry else ""
                decisions.append(self._decision(block, sites, budgets[phase], before, block is blocks[-1]))
        # A block reads what the one before it keeps: if one cannot be rewritten in one phase, none is.
        reason = self._reason(context, decisions)
        if reason is not None:
            for decision in decisions:
                if decision.status == "proposed":
                    decision.status, decision.reason = "refused", reason
        return decisions

    def _video_blocks(
        self, view: GraphView, sites: Sites, context: Context
    ) -> tuple[list[BlockSite], list[tuple[BlockSite, str]]]:
        grid = self.grid or context.facts.get("grid") or find_grid(view)
        found, refused = [], []
        for block in sites.block:
            layout = video_layout(view, block.attention, tuple(grid) if isinstance(grid, list) else grid)
            if isinstance(layout, Refusal):
                refused.append((block, str(layout)))
            else:
                found.append(block)
        return found, refused

    def _decision(self, block: BlockSite, sites: Sites, level: int, before: str, last: bool) -> Decision:
        inside = set(block.dims)
        covered = [site.id for site in (*sites.attention, *sites.linear) if site.node in inside]
        return Decision(
            site=block.id,
            method=self.name,
            pass_name=SelectTokens.name,
            options={
                "budget": level,
                "before": before,
                "last": last,
                "weights": [1.0, self.penalty],
                "normalise": self.normalise,
                "residual": self.residual,
                "tokens": self.tokens,
                "keys": self.keys,
            },
            reason="",
            facts=block.describe() | {"budget": f"{level / LEVELS:.1f}"},
            figures={"covers": covered},
            predicted_gain=1 - level / LEVELS,
        )

    def _refused(self, block: BlockSite, reason: str) -> Decision:
        return Decision(
            site=block.id,
            method=self.name,
            pass_name="",
            status="refused",
            reason=reason,
            facts=block.describe(),
        )

    def _reason(self, context: Context, decisions: Sequence[Decision]) -> str | None:
        """The first reason why a block cannot be rewritten as decided."""
        edits = {phase: Edit(exported) for phase, exported in context.phases.items()}
        blocks = {block.id: block for sites in context.sites.values() for block in sites.block}
        for decision in decisions:
            if decision.status != "proposed":
                continue
            reason = SelectTokens(**decision.options).guard(blocks[decision.site], edits[decision.phase])
            if reason is not None:
                return f"{decision.place}: {reason}"
        return None
