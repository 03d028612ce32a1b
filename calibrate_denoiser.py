"""Calibration of denoisers by real sampling runs: the inputs that each range of steps sees, and the videos.

A sampler is any callable that takes a denoiser (a drop-in for the transformer) and runs it over all steps of one
prompt. It returns the video or the latents, which later tell how far the rewritten program's are from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidArgument, InvalidType
from .html_report.png import png_address
from .inputs import CallSignature
from .patterns.steps import DEFAULT_TIMESTEPS, StepRange
from .profiles.reuse_figures import ReuseByStep, channel_groups, reuse_figures, reuses
from .program import Program
from .program_module import ProgramModule
from .progress import Progress
from .quality import compare

Sampler = Callable[[ProgramModule], Any]


@dataclass
class Recorded:
    """What calibration of a denoiser gave.

    Attributes:
        inputs: Phase -> flat inputs; of a sampler the call that is nearest to the middle of the phase's steps.
        samplers: The items that are samplers.
        outputs: What each sampler returned, None where that is no tensor.
    """

    inputs: dict[str, list[list[Any]]] = field(default_factory=dict)
    samplers: list[Sampler] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)


def denoiser_inputs(
    program: Program, items: Iterable[Any], steps: Mapping[str, StepRange], bar: Progress, most: int
) -> Recorded:
    """Inputs for each phase of a captured denoiser.

    Args:
        program: The canonical program.
        items: Samplers, or `(args, kwargs)` of single calls, which count for the phase that takes them. A phase that
            none falls into is given those of all others.
        steps: Phase -> its denoising steps.
        bar: Where progress is shown.
        most: At most this many inputs a phase.

    Raises:
        InvalidType: An item is neither.
        InvalidArgument: There is no item, a call does not fit, or a sampler skipped all steps of a phase.
    """
    items = list(items)
    if not items:
        raise InvalidArgument("calibration is empty")
    recorded = Recorded({name: [] for name in program.phases})
    with bar.stage("sampling for calibration", sum(map(callable, items)) * len(_timesteps(program))):
        for number, item in enumerate(items):
            if callable(item):
                _record(program, item, number, steps, recorded, bar)
            elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping):
                _, phase, flat = program.dispatch(*item[0], **item[1])
                recorded.inputs[phase].append(flat)
            else:
                raise InvalidType(
                    f"calibration item {number}: expected (args, kwargs) or a callable that samples with the denoiser"
                    f" that it is given, got {type(item).__name__}"
                )
    for inputs in recorded.inputs.values():
        del inputs[most:]
    known = [flat for inputs in recorded.inputs.values() for flat in inputs]
    for inputs in recorded.inputs.values():
        inputs += () if inputs else known[:most]
    return recorded


def _record(
    program: Program,
    sampler: Sampler,
    number: int,
    steps: Mapping[str, StepRange],
    recorded: Recorded,
    bar: Progress,
) -> None:
    timesteps = _timesteps(program)
    middle = len(timesteps) // 2
    targets = {name: timesteps[steps[name].middle if name in steps else middle] for name in program.phases}
    recorder = _Recorder(program, targets, bar)
    with torch.no_grad():
        output = sampler(recorder)
    for name, inputs in recorded.inputs.items():
        if name not in recorder.kept:
            seen = f"{recorder.calls} calls, none in phase {name}" if recorder.calls else "no call"
            raise InvalidArgument(
                f"calibration item {number}: the sampler made {seen}; its timesteps must be those of the capture"
            )
        inputs.append(recorder.kept[name][1])
    recorded.samplers.append(sampler)
    recorded.outputs.append(output.detach().clone() if isinstance(output, Tensor) else None)


def _timesteps(program: Program) -> Sequence[float]:
    return program.facts.get("timesteps") or DEFAULT_TIMESTEPS


class _Recorder(ProgramModule):
    """Keeps, of each phase, the call whose timestep is nearest to the target."""

    def __init__(self, program: Program, targets: Mapping[str, float], bar: Progress) -> None:
        super().__init__(program)
        self._timestep = program.facts["timestep"]
        self._targets = targets
        self._bar = bar
        self.calls = 0
        self.kept: dict[str, tuple[float, list[Any]]] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        bound, phase, flat = self.program.dispatch(*args, **kwargs)
        self.calls += 1
        self._bar.step()
        distance = abs(float(torch.as_tensor(bound[self._timestep]).flatten()[0]) - self._targets[phase])
        if phase not in self.kept or distance < self.kept[phase][0]:
            kept = [value.detach().clone() if isinstance(value, Tensor) else value for value in flat]
            self.kept[phase] = (distance, kept)
        return super().run(*args, **kwargs)


def compare_outputs(program: Program, recorded: Recorded, bar: Progress) -> None:
    """Sample again with the rewritten program, and note how far each video is from the dense one.

    Args:
        program: The rewritten program; `history.measured["video"]` gets PSNR and SSIM, one entry a sampler, and
            `history.measured["reuse"]` what was reused in each step, where scores are.
        recorded: The samplers and what they returned for the canonical program.
        bar: Where progress is shown.
    """
    pairs = [(s, o) for s, o in zip(recorded.samplers, recorded.outputs, strict=True) if o is not None]
    if not pairs or not any(decision.status == "kept" for decision in program.decisions):
        return
    found, frames = [], []
    counting = _ReuseCounter(program) if _reuses(program) else None
    with bar.stage("sampling to compare", len(pairs)), torch.no_grad():
        for sampler, reference in pairs:
            output = sampler(counting or program.as_module())
            if isinstance(output, Tensor) and output.shape == reference.shape:
                found.append(compare(reference, output))
                frames.append({"dense": _frames(reference), "rewritten": _frames(output)})
            bar.step()
    program.history.measured["video"] = found
    if counting is not None:
        program.history.measured["reuse"] = counting.by_step.summary()
    if frames and frames[0]["dense"]:
        program.history.measured["video_frames"] = frames


def _frames(video: Tensor) -> list[tuple[int, str]]:
    """(number, `data:` address) of a few frames, none where the sampler returned latents and not pixels in [0, 1]."""
    if video.dim() < 4 or video.shape[-3] != 3 or float(video.min()) < 0 or float(video.max()) > 1:
        return []
    frames = video.reshape(-1, *video.shape[-3:])
    step = max(1, -(-max(video.shape[-2:]) // _MOST_PIXELS))
    chosen = sorted({round(i * (len(frames) - 1) / (_MOST_FRAMES - 1)) for i in range(_MOST_FRAMES)})
    images = ((n, frames[n, :, ::step, ::step].permute(1, 2, 0).mul(255).round().to(torch.uint8)) for n in chosen)
    return [(number, png_address(image)) for number, image in images]


_MOST_FRAMES = 5
_MOST_PIXELS = 192
"""Frames and pixels a side that are kept for the page."""


def _reuses(program: Program) -> bool:
    # With state the graph's own run would not do: it writes none.
    return program.state_bytes() == 0 and any(reuses(phase.exported) for phase in program.phases.values())


class _ReuseCounter(ProgramModule):
    """Runs a program node by node and counts what it reuses."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.by_step = ReuseByStep()
        self._groups = channel_groups(program.decisions)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        bound, phase, flat = self.program.dispatch(*args, **kwargs)
        exported = self.program.phases[phase].exported
        figures, outputs = reuse_figures(exported, flat, self._groups)
        timestep = float(torch.as_tensor(bound[self.program.facts["timestep"]]).flatten()[0])
        self.by_step.add(timestep, figures)
        return CallSignature(exported, self.program.inputs).unflatten(outputs)
