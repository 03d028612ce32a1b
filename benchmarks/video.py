"""Sparse video attention on the small Wan model: whole samplings, curves, comparisons and ablations.

One function for each part of the table. Quality is PSNR and SSIM against the dense program's video of the same prompt
and seed; recall is the share of attention mass that is kept; density the share of the score map that is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

import graphwright as gw
from graphwright.benchmarks.timing import interleaved
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.examples.sample_video import noise_levels, sample
from graphwright.kernels.block_lists import density, lists_of
from graphwright.kernels.head_patterns import bandwidth_of, head_patterns
from graphwright.passes.sparsify_attention import BlockLists, SparsifyAttention, grid_sizes, order_node
from graphwright.patterns.steps import step_ranges
from graphwright.patterns.video import VideoLayout
from graphwright.profiles.video import Place, Proposal, VideoMethod
from graphwright.quality import compare


@dataclass(frozen=True)
class Setting:
    """One model at one size: the small Wan transformer, with `frames` of `size` x `size` pixels in `steps` steps.

    A token is 4x4 pixels of one frame.
    """

    frames: int
    size: int
    steps: int
    prompts: tuple[str, ...] = ("bikes", "bunny")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height and width in tokens."""
        return self.frames, self.size // 4, self.size // 4

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.frames * (self.size // 4) ** 2

    @cached_property
    def captured(self) -> gw.Captured:
        """The model, captured at this size."""
        inputs = {
            "hidden_states": torch.zeros(1, 12, self.frames, self.size // 2, self.size // 2),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": load_prompts()[self.prompts[0]],
        }
        return gw.capture_denoiser(load_tiny_wan(), inputs, timesteps=1000 * noise_levels(self.steps)[:-1])

    @cached_property
    def dense(self) -> gw.Program:
        """The canonical program."""
        return gw.optimize(self.captured, progress=False)

    @cached_property
    def reference(self) -> Tensor:
        """The dense program's video of the first prompt."""
        return self.sample(self.dense)

    def sample(self, denoise: Callable[..., Any], prompt: str | None = None, seed: int = 0) -> Tensor:
        """A video of a prompt, the first one by default."""
        return sample(
            denoise, load_prompts()[prompt or self.prompts[0]], frames=self.frames, height=self.size, width=self.size,
            steps=self.steps, seed=seed, progress=False,
        )  # fmt: skip

    def samplers(self) -> list[Callable[..., Tensor]]:
        """One a prompt, for calibration, of other seeds than the one that is compared."""
        return [
            lambda denoise, prompt=prompt, seed=seed: self.sample(denoise, prompt, seed + 1)
            for seed, prompt in enumerate(self.prompts)
        ]

    @cached_property
    def calls(self) -> list[tuple[tuple[()], dict[str, Any]]]:
        """Calls of the dense program, prompt after prompt and step after step: sampled once for all methods."""
        calls: list[tuple[tuple[()], dict[str, Any]]] = []

        def recording(**kwargs: Any) -> Any:
            calls.append(((), {name: value.clone() for name, value in kwargs.items()}))
            return self.dense(**kwargs)

        for sampler in self.samplers():
            sampler(recording)
        return calls

    def optimize(self, method: gw.Method) -> gw.Program:
        """The program of a method, whatever its speed: figures of quality must not depend on the machine's load."""
        schedule = method.schedule(self.steps)
        ranges = step_ranges(self.captured.facts["timesteps"], [schedule] if schedule else [])
        middles = [each.middle for each in ranges if each.name.startswith("sparse")]
        items = [self.calls[prompt * self.steps + step] for step in middles for prompt in range(len(self.prompts))]
        return gw.optimize(self.captured, methods=[method], calibration=items, keep="smaller", progress=False)


def quality(setting: Setting, method: gw.Method) -> dict[str, Any]:
    """Density, recall, PSNR and SSIM of one method over a whole sampling."""
    program = setting.optimize(method)
    found = compare(setting.reference, setting.sample(program))
    return found | {"density": _mean(program, "density"), "recall": _mean(program, "recall")}


def curve(setting: Setting, methods: Mapping[str, gw.Method]) -> dict[str, dict[str, Any]]:
    """Quality of each method, by its name."""
    return {name: quality(setting, method) for name, method in methods.items()}


def whole_sampling(setting: Setting, methods: Mapping[str, gw.Method], rounds: int = 2) -> dict[str, Any]:
    """Seconds of a whole sampling, dense and with each method, in turn; and their quality."""
    programs = {"dense": setting.dense} | {name: setting.optimize(method) for name, method in methods.items()}
    videos: dict[str, Tensor] = {}

    def run(name: str) -> None:
        videos[name] = setting.sample(programs[name])

    seconds = interleaved({name: lambda name=name: run(name) for name in programs}, rounds, warmup=0)
    return {
        name: {
            "seconds": seconds[name],
            "speedup": seconds["dense"] / seconds[name],
            **compare(videos["dense"], videos[name]),
            "density": _mean(program, "density"),
            "recall": _mean(program, "recall"),
        }
        for name, program in programs.items()
    }


def one_step(setting: Setting, methods: Mapping[str, gw.Method], rounds: int = 5) -> dict[str, float]:
    """Seconds of one call in the last step, where every method is active, in turn."""
    _, called = setting.calls[setting.steps - 1]
    programs = {"dense": setting.dense} | {name: setting.optimize(method) for name, method in methods.items()}
    return interleaved({n: lambda p=p: p(**called) for n, p in programs.items()}, rounds)


def _mean(program: gw.Program, figure: str) -> float:
    values = [v for d in program.decisions if d.status == "kept" for v in d.figures[figure]]
    return sum(values) / len(values) if values else 1.0


def sparsity_for(setting: Setting, wanted: float) -> float:
    """The sparsity with which RainFusion's bands reach a density on this grid, by bisection."""
    low, high = 0.01, 0.99
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if _band_density(setting, middle) > wanted else (low, middle)
    return round((low + high) / 2, 3)


def _band_density(setting: Setting, sparsity: float) -> float:
    rest = setting.tokens - setting.tokens // setting.frames
    _, counts, _ = head_patterns(
        *setting.grid, first=0, text=0, block_size=64, bandwidths=(bandwidth_of(sparsity),), tau=2
    )
    return density(counts[:1], rest // 64, setting.tokens, setting.tokens, 64)


def equal_density(setting: Setting, dense_steps: float, **options: Any) -> dict[str, Any]:
    """Compact Attention, RainFusion and random blocks at the density that Compact Attention finds."""
    compact = quality(setting, gw.CompactAttention(dense_steps=dense_steps, **options))
    wanted = compact["density"]
    rainfusion = quality(setting, gw.RainFusion(dense_steps=dense_steps, sparsity=sparsity_for(setting, wanted)))
    chance = quality(setting, RandomBlocks(dense_steps=dense_steps, density=wanted))
    return {"Compact Attention": compact, "RainFusion": rainfusion, "random blocks": chance}


def families(setting: Setting, dense_steps: float, cost: float) -> dict[str, dict[str, float]]:
    """Mean sparsity by window family, and by class of head as the richest family sees it."""
    found: dict[str, list[float]] = {}
    shapes: list[str] = []
    for family in ("cubic", "grouped", "dual"):
        program = setting.optimize(gw.CompactAttention(dense_steps=dense_steps, cost=cost, family=family))
        sites = [d for d in program.decisions if "sparsity" in d.figures]
        found[family] = [value for d in sites for value in d.figures["sparsity"]]
        shapes = [shape for d in sites for shape in d.figures["shape"]]
    table = {family: {"all": sum(values) / len(values)} for family, values in found.items()}
    for shape in sorted(set(shapes)):
        for family, values in found.items():
            chosen = [value for value, own in zip(values, shapes, strict=True) if own == shape]
            table[family][f"{shape} ({len(chosen)})"] = sum(chosen) / len(chosen)
    return table


def start_steps(setting: Setting, method: type[Any], shares: Sequence[float], **options: Any) -> dict[str, Any]:
    """Quality by the share of dense steps at the beginning; and with the last one at the end instead."""
    found = {f"first {share:.0%} dense": quality(setting, method(dense_steps=share, **options)) for share in shares}
    last = shares[-1]
    found[f"last {last:.0%} dense"] = quality(setting, method(dense_steps=0.0, dense_tail=last, **options))
    return found


def search_seconds(setting: Setting, dense_steps: float) -> dict[str, Any]:
    """Seconds of a whole search of Compact Attention on all prompts; the sampling for it is not counted."""
    program = setting.optimize(gw.CompactAttention(dense_steps=dense_steps))
    heads = sum(len(decision.figures["sparsity"]) for decision in program.decisions if decision.figures)
    seconds = program.history.measured["decide_seconds"]
    return {"seconds": seconds, "configurations": heads, "prompts": len(setting.prompts)}


@dataclass(frozen=True)
class KeepRandomBlocks(SparsifyAttention):
    """Random key blocks for each head, the first frame and text dense as in RainFusion."""

    name: ClassVar[str] = "keep_random_blocks"

    share: float = 0.5
    seed: int = 0

    def refuse(self, site: Any, layout: VideoLayout) -> str | None:
        """Any grid of two frames and more."""
        return None if isinstance(layout.frames, int) and layout.frames > 1 else "needs a static grid of two frames"

    def lists(self, site: Any, layout: VideoLayout, edit: Any) -> BlockLists:
        """Lists of equal length, drawn for each head and query block."""
        sizes = grid_sizes(site, layout, edit)
        size = (layout.frames - 1) * layout.height * layout.width // self.block_size
        order = order_node("raster", sizes, site, edit, protect_frame=True, shape=())
        generator = torch.Generator().manual_seed(self.seed + sum(map(ord, site.id)))
        scores = torch.rand(site.heads, size, size, generator=generator)
        kept = scores.argsort(-1).argsort(-1) < max(1, round(self.share * size))
        counts, blocks = lists_of(kept)
        name = f"{site.module_path}.random_{site.phase}_{self.share:.4f}".replace("0.", "")
        return BlockLists(
            edit.buffer(f"{name}.counts", lambda: counts),
            edit.buffer(f"{name}.blocks", lambda: blocks),
            None,
            order,
            size,
        )


class RandomBlocks(VideoMethod):
    """Chance, at a given density."""

    name: ClassVar[str] = "random_blocks"
    reference: ClassVar[str] = "the baseline of benchmarks/video.py"
    rewrites: ClassVar[str] = "video self-attention, at random"

    density: float = Field(0.5, gt=0, le=1, description="Share of the score map to compute.")
    seed: int = 0

    def propose(self, places: Sequence[Place], context: Any) -> Mapping[str, Proposal | str]:
        """The share of listed blocks that gives the density together with the protected frame."""
        answers: dict[str, Proposal | str] = {}
        for place in places:
            frame = 1 / int(place.layout.frames)
            protected = 2 * frame - frame**2
            share = max((self.density - protected) / (1 - protected), 0.01)
            options = {
                "grid": [place.layout.frames, place.layout.height, place.layout.width],
                "block_size": self.block_of(place.tokens),
                "share": share,
                "seed": self.seed,
            }
            answers[place.site.id] = Proposal("keep_random_blocks", options, self.density)
        return answers
