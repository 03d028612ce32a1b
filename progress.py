"""Progress bars with the time left, on a terminal; silence everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress:
    """Shows named stages, each with its steps.

    Args:
        enabled: Show anything at all; where the output is no terminal nothing is shown either way.
    """

    def __init__(self, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
        )
        self._task: int | None = None
        self._name = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """Show a stage while the body runs; `total` is its number of steps, None where that is not known."""
        outer, self._task = (self._task, self._name), self._bar.add_task(name, total=total)
        self._name = name
        try:
            yield
        finally:
            self._bar.remove_task(self._task)  # pyright: ignore[reportArgumentType]
            self._task, self._name = outer

    def step(self, note: str = "", advance: int = 1) -> None:
        """A step of the current stage is done, or 0; a note stands beside the stage's name until the next one."""
        if self._task is not None:
            described = {"description": f"{self._name}, {note}"} if note else {}
            self._bar.update(self._task, advance=advance, **described)  # pyright: ignore[reportArgumentType]
