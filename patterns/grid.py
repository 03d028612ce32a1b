"""The latent grid (frames, height, width) of a video transformer, proved from the graph.

Three kinds of evidence, each a shape that a model cannot have without the grid: the patch convolution's output, the
axes of the rotary embedding's meshgrid, and the reshape that unpatchifies the last linear. Candidates are checked
against each other: a fact counts where all evidence agrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .graph import GraphView
from .nodes import RESHAPES, aten, is_call, same_size, shape_of


@dataclass(frozen=True)
class Grid:
    """A latent grid in tokens.

    Attributes:
        sizes: (frames, height, width); None where the size is dynamic.
        evidence: What it was proved from.
    """

    sizes: tuple[int | None, int | None, int | None]
    evidence: tuple[str, ...]

    @property
    def tokens(self) -> int | None:
        """Frames times height times width, None where one is dynamic."""
        frames, height, width = self.sizes
        return None if frames is None or height is None or width is None else frames * height * width


def find_grid(view: GraphView) -> Grid | None:
    """The grid, or None where there is no evidence or the evidence disagrees."""
    found = [(kind, sizes) for kind, sizes in _evidence(view) if len(sizes) == 3]
    if not found:
        return None
    first = found[0][1]
    for _, sizes in found[1:]:
        if not all(_agree(a, b) for a, b in zip(first, sizes, strict=True)):
            return None
    known = tuple(size if isinstance(size, int) else None for size in first)
    return Grid(known, tuple(dict.fromkeys(kind for kind, _ in found)))  # pyright: ignore[reportArgumentType]


def _evidence(view: GraphView) -> Iterator[tuple[str, tuple[Any, ...]]]:
    last_linear: Node | None = None
    for node in view.graph.nodes:
        if is_call(node, aten.conv3d.default) and _is_patching(node):
            yield "patch convolution", tuple(shape_of(node)[2:])
        elif is_call(node, aten.conv2d.default) and _is_patching(node):
            frames = _folded_frames(node)
            if frames is not None:
                yield "patch convolution", (frames, *shape_of(node)[2:])
        elif is_call(node, aten.meshgrid.indexing, aten.meshgrid.default):
            yield "rotary meshgrid", tuple(shape_of(axis)[0] for axis in node.args[0])  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        elif is_call(node, aten.linear.default):
            last_linear = node
    if last_linear is not None:
        for user in last_linear.users:
            if user.target in RESHAPES and len(shape_of(user)) >= 7:
                yield "unpatchify", tuple(shape_of(user)[1:4])


def _is_patching(node: Node) -> bool:
    """Whether a convolution's stride is its kernel: every patch becomes one token."""
    weight, stride = node.args[1], node.args[3] if len(node.args) > 3 else None
    kernel = shape_of(weight)[2:] if isinstance(weight, Node) else ()
    return isinstance(stride, list | tuple) and list(stride) == list(kernel)


def _folded_frames(node: Node) -> Any:
    """Frames that were folded into the batch of a 2-D convolution, from the 5-D tensor before it."""
    source = node.args[0]
    while isinstance(source, Node) and source.op == "call_function" and len(shape_of(source)) != 5:
        source = source.args[0] if source.args and isinstance(source.args[0], Node) else None
    if not isinstance(source, Node) or len(shape_of(source)) != 5:
        return None
    batch, *rest = shape_of(source)
    folded = shape_of(node)[0]
    return next((size for size in rest[:2] if same_size(batch * size, folded)), None)


def _agree(left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return True  # A dynamic size that is written in two ways cannot be told apart from itself.
