"""Rotate a residual stream: it carries h R, and every number that leaves the program is as before (R1 of the papers).

    embedding(E)         becomes   embedding(E R)
    linear(W, b) + h     becomes   linear(R^T W, R^T b) + h
    linear(norm_g(h), W)     becomes   linear(norm(h), W diag(g) R)

Norms must lose their gains first, and tied heads their ties: both happen in the same step, since both make new weights
anyway. RMSNorm without a gain commutes with R because it looks at the length of h alone. R is a tensor that the profile
carries; it costs nothing when the program runs.

Source: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), section 3.1, and SliceGPT (Ashkboos et al. 2024,
arXiv:2401.15024) for the invariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..patterns.residual import ResidualStream
from .base import SitePass
from .edit import Edit
from .fold_norm import mixed_norms, rewrite_stream

ORTHOGONAL = 1e-4
"""Largest entry of R^T R - I that is taken for rounding: a float32 QR of some thousand columns leaves about 1e-6."""


@dataclass(frozen=True)
class Rotate(SitePass[ResidualStream]):
    """Fold norms, untie, and fold a rotation into all writers and readers.

    Attributes:
        rotation: Name of the profile's tensor R [width, width]; "" folds and unties only.
    """

    name: ClassVar[str] = "rotate"
    exact: ClassVar[bool] = True
    ensures: ClassVar[str] = "canonical"

    rotation: str = ""

    def guard(self, site: ResidualStream, edit: Edit) -> str | None:
        """An orthogonal matrix of the stream's width, and norms that can be folded."""
        reason = mixed_norms(site)
        if reason is None and self.rotation:
            reason = not_a_rotation(edit, self.rotation, (site.width, site.width))
        return reason

    def rewrite(self, site: ResidualStream, edit: Edit) -> None:
        """Make the rotated weights."""
        rewrite_stream(site, edit, sharpened(edit.shared[self.rotation]) if self.rotation else None, "rotated")


def not_a_rotation(edit: Edit, name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor of the profile is no rotation of this shape (the last two dimensions orthogonal), or None."""
    tensor = edit.shared.get(name)
    if tensor is None:
        return f"the profile has no tensor {name}"
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        return f"{name} is {tensor.dtype}{list(tensor.shape)}, expected a float tensor {list(shape)}"
    error = orthogonality_error(tensor)
    return None if error <= ORTHOGONAL else f"{name} is not orthogonal: R^T R differs from I by {error:.2g}"


def sharpened(rotation: Tensor) -> Tensor:
    """A rotation in float64, orthogonal to its precision: what a float32 file leaves (1e-7) would add up over layers.

    Two Newton steps towards the nearest orthogonal matrix, R (3 I - R^T R) / 2, each of which squares the error.
    """
    result = rotation.double()
    for _ in range(2):
        result = 1.5 * result - 0.5 * result @ (result.mT @ result)
    return result


def orthogonality_error(rotation: Tensor) -> float:
    """The largest entry of R^T R - I, infinite where R holds NaN or infinity."""
    wide = rotation.double()
    product = wide.mT @ wide
    error = float((product - torch.eye(rotation.shape[-1], dtype=torch.float64, device=product.device)).abs().max())
    return error if error == error else float("inf")
