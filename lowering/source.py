"""What a target needs of a program to write it: phases, how it is called, and what its state starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..phases import Phase


@dataclass(frozen=True)
class Source:
    """A program as the targets see it.

    Attributes:
        phases: By name, in the order in which their conditions are tried, the most general last.
        inputs: Names of the call's arguments.
        kind: "module", "causal_lm" or "denoiser".
        facts: What capture knows of the model.
        initial: State as it was at capture, by qualified name.
    """

    phases: Mapping[str, Phase]
    inputs: tuple[str, ...]
    kind: str
    facts: Mapping[str, Any]
    initial: Mapping[str, Tensor]

    def files(self, path: Path) -> dict[str, str]:
        """Phase -> its file: the most general has the name that was asked for, the others theirs in it."""
        *others, general = self.phases
        return {name: f"{path.stem}.{name}{path.suffix}" for name in others} | {general: path.name}
