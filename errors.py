"""The errors that graphwright raises: each names what is wrong, and each is also the built-in kind that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class GraphwrightError(Exception):
    """Any error that graphwright raises on purpose; the command line prints it in one line and exits with 2."""


class InvalidArgument(GraphwrightError, ValueError):
    """A value that no graph or method can take: an unknown option, a bad range, a device that is not there."""


class InvalidType(GraphwrightError, TypeError):
    """An argument of the wrong kind, or a call whose arguments do not fit the captured signature."""


class InvalidFile(GraphwrightError, OSError):
    """A file that is missing, foreign, truncated, unsafe to read, or that cannot be written."""


class CaptureError(GraphwrightError, ValueError):
    """A module that could not be exported, or an export that lacks what a later stage needs."""


class StaleProfile(GraphwrightError, ValueError):
    """A profile that was made for another graph, other weights or another schema."""


class VerificationError(GraphwrightError, RuntimeError):
    """A pass broke an invariant: dialect, graph, signature or numbers. Always a defect of the pass."""


class MissingKernel(GraphwrightError, NotImplementedError):
    """An operator has no implementation for the device, dtype or shape it was called with."""


class UnsupportedLowering(GraphwrightError, NotImplementedError):
    """A target cannot take an operator, a size or a dtype of a program; the message names it."""


class OffloadError(GraphwrightError, OSError):
    """The slow memory of a cache fails or is full.

    Attributes:
        generated: What `Program.generate` had by then, prompt included: int64 [batch, tokens]; None elsewhere.
    """

    generated: Tensor | None = None


class MissingExtra(GraphwrightError, ImportError):
    """An optional package is not installed; the message has the pip command that brings it."""
