"""One program on every target: the same calls, and how far each is from PyTorch.

The error is the largest difference over the largest value, over all outputs of all calls, which share state: a wrong
cache shows in the calls after it. The tolerance follows from the outputs' dtype, 1024 roundings of it, or from 8 bits
where ONNX Runtime's own operator rounds activations anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import GraphwrightError, InvalidArgument
from ..inputs import bind, require_all
from ..phases import plan_for
from ..torch_private import load_package, pytree
from .source import Source
from .to_onnx.lower import Ops, plan
from .to_onnx.quantized import INT4

TARGETS = (*(f"onnx {ops}" for ops in get_args(Ops)), "aoti")
_FRESH_GRID = 8 / 127
"""Steps of 8 bits, in up to eight linears one after the other."""

Call = tuple[Sequence[Any], dict[str, Any]]


@dataclass(frozen=True)
class Agreement:
    """How far a target is from PyTorch.

    Attributes:
        target: One of `TARGETS`.
        largest: The largest difference.
        relative: The same over the largest value.
        tolerance: What `relative` may be.
        refused: Why there are no figures.
    """

    target: str
    largest: float = float("nan")
    relative: float = float("nan")
    tolerance: float = float("nan")
    refused: str = ""

    @property
    def holds(self) -> bool:
        """Whether the target ran and agrees."""
        return self.relative <= self.tolerance


def compare_targets(
    source: Source, calls: Sequence[Call], expected: Sequence[Any], targets: Sequence[str] = TARGETS
) -> list[Agreement]:
    """Run calls on targets.

    Args:
        source: The program.
        calls: Positional and keyword inputs, in the order in which they are made from fresh state.
        expected: What PyTorch gave for each.
        targets: Some of `TARGETS`; "aoti" compiles, which takes minutes for a large model.

    Raises:
        InvalidArgument: There is no such target.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise InvalidArgument(f"unknown target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    made = []
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            try:
                run = _open(source, target, Path(folder))
                made.append(_agreement(target, [run(*args, **kwargs) for args, kwargs in calls], expected, source))
            except GraphwrightError as error:
                made.append(Agreement(target, refused=str(error)))
    return made


def _open(source: Source, target: str, folder: Path) -> Any:
    if target == "aoti":
        return _Packages(source, folder / "model.pt2")
    from .to_onnx.program import load_onnx
    from .to_onnx.write import export

    export(source, folder / "model.onnx", ops=target.split(" ")[1])
    return load_onnx(folder / "model.onnx")


def _agreement(target: str, found: Sequence[Any], expected: Sequence[Any], source: Source) -> Agreement:
    pairs = list(zip(pytree.tree_leaves(list(found)), pytree.tree_leaves(list(expected)), strict=True))
    largest = max(float((got.double() - wanted.double()).abs().max()) for got, wanted in pairs)
    scale = max(float(wanted.abs().max()) for _, wanted in pairs)
    tolerance = max(1024 * torch.finfo(wanted.dtype).eps for _, wanted in pairs if wanted.is_floating_point())
    if target == "onnx ort":
        choices = [choice for phase in source.phases.values() for choice in plan(phase.exported, "ort")]
        anew = [c.lowering is not None and c.lowering.becomes == INT4 for c in choices]
        rounded = any(new and c.operator != "int4_weight_linear" for new, c in zip(anew, choices, strict=True))
        tolerance = max(tolerance, _FRESH_GRID if rounded else 0.0)
    return Agreement(target, largest, largest / scale if scale else largest, tolerance)


class _Packages:
    """Packages called like the program."""

    def __init__(self, source: Source, path: Path) -> None:
        from .to_aoti.write import export, lower_aoti

        export(source, path)
        self._source = source
        self._packages = {name: load_package(path.with_name(file)) for name, file in source.files(path).items()}
        self._interfaces = {name: lower_aoti(phase.exported)[1] for name, phase in source.phases.items()}
        self._state: dict[str, Tensor] = {name: value.clone() for name, value in source.initial.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the phase that takes these inputs."""
        bound = bind(self._source.inputs, args, kwargs)
        require_all(bound, self._source.inputs, self._source.facts)
        name = plan_for((phase.plan for phase in self._source.phases.values()), bound).name
        interface = self._interfaces[name]
        flat = pytree.tree_leaves([bound[key] for key in self._source.inputs])
        state = [self._state[key] for key in interface.state]
        made = self._packages[name](*(flat[place] for place in interface.leaves), *state)
        self._state |= dict(zip(interface.state, made[len(interface.outputs) :], strict=True))
        return list(made[: len(interface.outputs)])
