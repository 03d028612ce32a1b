"""The packages of the `demo` extra: where one is missing, the error has the pip command that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from graphwright.errors import MissingExtra


@contextmanager
def demo_extra() -> Iterator[None]:
    """Wrap the imports of packages that only the examples need.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'graphwright[demo]'") from error
