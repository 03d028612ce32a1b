"""What each operator of the namespace `graphwright` becomes on each target, and what falls back to what.

    (operator, target) -> lowerings, each with a validator, a priority and an emitter; or an explicit refusal

A lowering is chosen for each call: of those whose validator answers None the one with the highest priority; the others'
reasons are kept, so that a dry run can say what fell back and why. Where none takes a call the target's fallback is
tried, if it has one: the operator's reference, traced into ATen.

A target's lowerings are entered when its modules are imported (`MODULES`), which needs none of the target's libraries.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

from torch.fx import Node

from .. import kernels
from ..errors import InvalidArgument, UnsupportedLowering
from ..kernels.contract import OPERATORS, Operator
from .targets import Target

MODULES: dict[str, tuple[str, ...]] = {
    "eager": ("eager_operators",),
    "aoti": ("to_aoti.operators",),
    "onnx": ("to_onnx.operators", "to_onnx.quantized"),
    "tensorrt": ("to_tensorrt.operators",),
    "tensorrt_rtx": ("to_tensorrt_rtx.operators",),
}
"""Target -> the modules of this folder that register its lowerings."""

Validator = Callable[[Node, Operator], str | None]


def always(node: Node, operator: Operator) -> str | None:
    """The validator of a lowering that takes every call of its operator."""
    return None


@dataclass(frozen=True)
class Lowering:
    """One way in which an operator is lowered.

    Attributes:
        operator: Its name in the namespace.
        target: Where it goes.
        becomes: What a dry run prints, such as "MatMulNBits (com.microsoft), 4 bits".
        emit: What the target does with it; each target's module says what it expects here.
        validate: (call, operator) -> None, or the reason why this call cannot be lowered so.
        priority: The highest that validates is taken; fallbacks have negative ones.
        choices: Values of the target's `ops` for which this lowering stands; empty for all.
    """

    operator: str
    target: str
    becomes: str
    emit: Any = None
    validate: Validator = always
    priority: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What one call becomes.

    Attributes:
        node: The call.
        lowering: What was chosen; None where nothing takes it.
        passed_over: Lowerings of higher priority that did not take it, each with the reason.
    """

    node: Node
    lowering: Lowering | None
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def operator(self) -> str:
        """The operator's name."""
        return name_of(self.node) or ""

    @property
    def reason(self) -> str:
        """Why nothing takes it."""
        return "; ".join(f"{what}: {why}" if what else why for what, why in self.passed_over)


_LOWERINGS: dict[tuple[str, str], list[Lowering]] = {}
_REFUSALS: dict[tuple[str, str], str] = {}
_FALLBACKS: dict[str, Callable[[Operator], Lowering]] = {}


def register(lowering: Lowering) -> Lowering:
    """Enter a lowering; several for one operator and target are tried by priority."""
    _require_target(lowering.target)
    _LOWERINGS.setdefault((lowering.operator, lowering.target), []).append(lowering)
    return lowering


def refuse(operator: str, target: str, reason: str) -> None:
    """Say that an operator is not lowered to a target, and why, with the way out."""
    _require_target(target)
    _REFUSALS[operator, target] = reason


def fallback(target: str, make: Callable[[Operator], Lowering]) -> None:
    """Set what a target does with an operator that nobody registered for it."""
    _require_target(target)
    _FALLBACKS[target] = make


def load(target: str) -> None:
    """Import the modules that register a target's lowerings.

    Raises:
        InvalidArgument: There is no such target.
    """
    _require_target(target)
    load_operators()
    for module in MODULES[target]:
        importlib.import_module(f"{__package__}.{module}")


@cache
def load_operators() -> None:
    """Import every operator of graphwright, which fills `kernels.contract.OPERATORS`."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.name.endswith("_triton"):  # these hold no operators, and need triton
            importlib.import_module(f"{kernels.__name__}.{module.name}")


def lowerings(operator: str, target: str, choice: str = "") -> list[Lowering]:
    """The lowerings of an operator, the one to try first in front, the target's fallback last."""
    load(target)
    found = [
        lowering
        for lowering in _LOWERINGS.get((operator, target), [])
        if not choice or not lowering.choices or choice in lowering.choices
    ]
    if operator in OPERATORS and target in _FALLBACKS and (operator, target) not in _REFUSALS:
        found.append(_FALLBACKS[target](OPERATORS[operator]))
    return sorted(found, key=lambda lowering: -lowering.priority)


def refusal(operator: str, target: str) -> str | None:
    """Why an operator is explicitly not lowered to a target, or None."""
    load(target)
    return _REFUSALS.get((operator, target))


def choose(node: Node, target: str, choice: str = "") -> Choice:
    """The lowering of one call.

    Args:
        node: A call of one of graphwright's operators.
        target: Where it goes.
        choice: The target's `ops`, where it has some.
    """
    name = name_of(node)
    if name is None or name not in OPERATORS:
        return Choice(node, None, (("", f"{node.target} is no operator that graphwright knows"),))
    reason = refusal(name, target)
    passed: list[tuple[str, str]] = [] if reason is None else [("", reason)]
    for lowering in lowerings(name, target, choice):
        why = lowering.validate(node, OPERATORS[name])
        if why is None:
            return Choice(node, lowering, tuple(passed))
        passed.append((lowering.becomes, why))
    return Choice(node, None, tuple(passed) or (("", f"nothing lowers it to {target}"),))


def choose_all(nodes: Iterable[Node], target: str, choice: str = "") -> list[Choice]:
    """The lowerings of all calls of graphwright's operators among some nodes, in their order."""
    return [choose(node, target, choice) for node in nodes if name_of(node) is not None]


def require(choices: Iterable[Choice], target: str) -> None:
    """Check that everything has a lowering.

    Raises:
        UnsupportedLowering: Names each operator that has none, with the reason.
    """
    refused = {f"graphwright::{choice.operator}: {choice.reason}" for choice in choices if choice.lowering is None}
    if refused:
        raise UnsupportedLowering(f"cannot be lowered to {target}: {'; '.join(sorted(refused))}")


def uncovered(target: str, operators: Iterable[str] | None = None) -> list[str]:
    """Operators with neither a registered lowering nor an explicit refusal for a target."""
    load(target)
    return sorted(
        name
        for name in operators or OPERATORS
        if not _LOWERINGS.get((name, target)) and (name, target) not in _REFUSALS
    )


def name_of(node: Node) -> str | None:
    """The operator's name, None for what is not in graphwright's namespace."""
    if node.op != "call_function" or getattr(node.target, "namespace", None) != "graphwright":
        return None
    return str(node.target).split(".")[1]


@dataclass
class Row:
    """One line of a dry run: how many calls of an operator become what."""

    operator: str
    becomes: str
    calls: int = 0
    passed_over: dict[str, str] = field(default_factory=dict)
    taken: bool = True


def summarize(choices: Iterable[Choice]) -> list[Row]:
    """What a dry run prints: one row for each operator and what it becomes."""
    rows: dict[tuple[str, str], Row] = {}
    for choice in choices:
        becomes = choice.lowering.becomes if choice.lowering is not None else f"refused: {choice.reason}"
        row = rows.setdefault((choice.operator, becomes), Row(choice.operator, becomes))
        row.calls += 1
        row.taken = choice.lowering is not None
        row.passed_over |= dict(choice.passed_over) if choice.lowering is not None else {}
    return list(rows.values())


def _require_target(target: str) -> None:
    if target not in get_args(Target):
        raise InvalidArgument(f"unknown target {target!r}; there are {', '.join(get_args(Target))}")
