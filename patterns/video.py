"""What a video method needs to know of an attention site: which of its tokens are video, in which grid, and the mask.

    queries = keys = [text | video] or [video | text]        video token n is (frame, row, column), column fastest

Where the video stands in the sequence is read from the dataflow: the tokens of query, key and value are followed back
through every join and cut to where they come from, and the video is what has the grid's length and descends from the
patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .attention import AttentionSite
from .graph import GraphView, Refusal
from .grid import Grid, find_grid
from .nodes import VIEWS, aten, is_call, same_shape, same_size, shape_of, strip
from .token_runs import Run, token_runs


@dataclass(frozen=True, eq=False)  # Comparing dynamic sizes would add a guard to the program.
class VideoLayout:
    """Where the video tokens of an attention are; sizes are ints, or `SymInt` where the program is dynamic.

    Attributes:
        frames: Frames of the grid in tokens; one for an image.
        height, width: Rows and columns of a frame, always ints.
        text: Tokens of the sequence that are no video.
        first: Index of the first video token; the video is not interrupted.
        key_mask: [1|B, 1, 1, keys], bool (True keeps) or added to the scores, where each key is masked alike for all
            queries; None where no mask hides anything.
    """

    frames: Any
    height: int
    width: int
    text: Any
    first: Any
    key_mask: Node | None

    @property
    def tokens(self) -> Any:
        """Number of video tokens."""
        return self.frames * self.height * self.width

    def describe(self) -> dict[str, str]:
        """Facts for tables."""
        if same_size(self.text, 0):
            text = "none"
        elif same_size(self.first, 0):
            text = f"{self.text} last"
        else:
            text = f"{self.text} first" if same_size(self.first, self.text) else f"{self.text} on both sides"
        image = " (an image)" if same_size(self.frames, 1) else ""
        return {
            "grid": f"{self.frames} x {self.height} x {self.width}{image}",
            "text": text,
            "key mask": "none" if self.key_mask is None else self.key_mask.name,
        }


def video_layout(
    view: GraphView, site: AttentionSite, grid: Grid | Sequence[int | None] | None = None
) -> VideoLayout | Refusal:
    """Prove where the video tokens of an attention site are.

    Args:
        view: The canonical graph, earlier sites of which may have been rewritten.
        site: An attention.
        grid: Frames, height and width in tokens, None for a dynamic number of frames. By default what `find_grid`
            proves; where it is given, it is checked against the length of the sequence.

    Returns:
        The layout, or why the site is no video attention that a method may restrict.
    """
    if not same_size(site.queries, site.keys):
        return view.refuse(site.node, "queries and keys differ in number", queries=site.queries, keys=site.keys)
    if site.attention == "cross":
        return view.refuse(site.node, "queries and keys come from different tokens (cross attention)")
    grid = grid if grid is not None else find_grid(view)
    if grid is None:
        return view.refuse(
            site.node,
            "the graph proves no grid and none is given: give grid=(frames, height, width) in tokens",
            depth=1,
        )
    sizes = tuple(grid.sizes if isinstance(grid, Grid) else grid)
    if len(sizes) != 3 or any(size is not None and size < 1 for size in sizes):
        return view.refuse(site.node, "the grid is not (frames, height, width) in tokens", depth=1, grid=sizes)
    frames, height, width = sizes
    if height is None or width is None:
        return view.refuse(site.node, "height or width of the grid is dynamic", depth=1, grid=sizes)
    masked = site.mask.kind not in ("none", "always")
    if masked and site.mask.per_key is None:
        return view.refuse(
            site.node,
            "the mask is not the same for all queries",
            depth=2,
            mask=site.mask.kind,
            because=site.mask.reason,
        )
    runs, *others = (token_runs(view, node, 2) for node in (site.query, site.key, site.value))
    found = _video_run(view, site, runs, (frames, height, width))
    if isinstance(found, Refusal):
        return found
    if not all(_is_alike(runs, other, found) for other in others):
        return view.refuse(site.node, "queries, keys and values do not have the video at the same places", depth=7)
    video = runs[found]
    return VideoLayout(
        frames=frames if frames is not None else video.length // (height * width),
        height=height,
        width=width,
        text=sum(run.length for run in runs if run is not video),
        first=sum(run.length for run in runs[:found]),
        key_mask=site.mask.per_key if masked else None,
    )


def _is_alike(runs: Sequence[Run], other: Sequence[Run], video: int) -> bool:
    """Whether other tokens have the same video at the same place; text may be chosen anew for keys and values."""
    return (
        len(runs) == len(other)
        and all(same_size(a.length, b.length) for a, b in zip(runs, other, strict=True))
        and runs[video].is_same(other[video])
    )


def _video_run(
    view: GraphView, site: AttentionSite, runs: Sequence[Run], sizes: tuple[int | None, int, int]
) -> int | Refusal:
    """Index of the one run that is the video."""
    frames, height, width = sizes
    facts = {
        "tokens": site.queries,
        "grid": " x ".join("?" if size is None else str(size) for size in sizes),
        "made of": " + ".join(str(run.length) for run in runs),
    }

    def fits(run: Run) -> bool:
        if frames is None:
            return statically_known_true(run.length % (height * width) == 0)
        return same_size(run.length, frames * height * width)

    of_length = [index for index, run in enumerate(runs) if fits(run)]
    if not of_length:
        product = height * width if frames is None else frames * height * width
        reason = f"no part of the sequence has {'a multiple of ' if frames is None else ''}{product} tokens"
        return view.refuse(site.node, f"{reason}, as the grid asks for", depth=4, **facts)
    patches = [node for node in view.graph.nodes if _is_patches(node, sizes)]
    descending = [i for i in of_length if set(patches) & set(view.ancestors(runs[i].source))] if patches else of_length
    if not descending:
        return view.refuse(site.node, "its tokens do not come from the video's patches", depth=5, **facts)
    if len(descending) > 1:
        return view.refuse(site.node, "several parts of the sequence could be the video", depth=5, **facts)
    (found,) = descending
    if not _is_raster(view, runs[found], patches):
        return view.refuse(site.node, "video tokens are not in the order frame, row, column", depth=6, **facts)
    return found


def _is_patches(node: Node, sizes: tuple[int | None, int, int]) -> bool:
    """Whether a convolution gives one place to each token of the grid, frames folded into the batch for a 2-D one."""
    frames, height, width = sizes
    if not is_call(node, aten.conv2d.default, aten.conv3d.default):
        return False
    *before, rows, columns = shape_of(node)
    if not same_shape((rows, columns), (height, width)):
        return False
    if node.target is aten.conv2d.default:
        return frames is None or statically_known_true(before[0] % frames == 0)
    return frames is None or same_size(before[-1], frames)


def _is_raster(view: GraphView, run: Run, patches: Sequence[Node]) -> bool:
    """Whether tokens that are a view of the patches are in raster order; true where they are made in another way."""
    source, batch = run.source, shape_of(run.source)[:1]
    base = strip(source, VIEWS)
    if base not in patches or len(shape_of(source)) != 3 or not isinstance(batch[0], int):
        return True

    def tokens(x: Tensor) -> Tensor:
        """[B, C, T, H, W], or [B * T, C, H, W], as [B, C, N] or [B, N, C]."""
        x = x if x.dim() == 5 else x.unflatten(0, (int(batch[0]), -1)).transpose(1, 2)
        return x.flatten(2) if run.dim == 2 else x.flatten(2).transpose(1, 2)

    return view.is_layout_of(source, base, tokens)
