"""Runs passes over one phase's graph: order, timing, verification and one callback.

Invariants that hold between passes (inside a pass they may be broken):
- the graph is functional and in the dialect that the pass ensures; `ExportedProgram.validate` and graph lint pass;
- `meta["val"]` of every node is what running the operator on fake tensors gives;
- the signature names the graph's inputs and outputs; dead weights are gone;
- an exact pass leaves the outputs on the example inputs as they were, up to re-associated sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import InvalidArgument, VerificationError
from ..patterns.graph import Refusal
from .base import Pass
from .dialects import TOLERANCE, example_outputs, largest_difference, verify
from .edit import Edit
from .undo import Snapshot, Undo


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one phase.

    `difference` is the largest difference of the outputs over their largest value, None where the pass changed nothing
    or is not exact. Times are in seconds. `undo` leads from the graph after the pass to that before it; None where the
    pass changed nothing, and in files of versions that did not keep it.
    """

    name: str
    phase: str
    changed: int
    nodes_before: int
    nodes_after: int
    seconds: float
    verify_seconds: float
    difference: float | None = None
    refusals: tuple[Refusal, ...] = ()
    undo: Undo | None = None


OnPass = Callable[[PassRecord, ExportedProgram], None]


class PassManager:
    """Runs passes in the order that their declared needs ask for.

    Args:
        passes: The passes; among those that do not depend on each other the given order is kept.
        on_pass: Called after each pass with its record and the program as it is then.
        check_numbers: Whether exact passes are checked on the example inputs.

    Raises:
        InvalidArgument: The declared needs contradict each other.
    """

    def __init__(self, passes: Sequence[Pass], *, on_pass: OnPass | None = None, check_numbers: bool = True) -> None:
        self.passes = _ordered(passes)
        self.on_pass = on_pass
        self.check_numbers = check_numbers

    def run(
        self, exported: ExportedProgram, phase: str = "main", shared: dict[str, Tensor] | None = None
    ) -> list[PassRecord]:
        """Run all passes over a program, in place.

        Args:
            exported: A functional program.
            phase: Its name, for the records.
            shared: Tensors that several phases share.

        Returns:
            One record a pass, in the order in which they ran.

        Raises:
            VerificationError: A pass broke an invariant. The message names it and those that ran before.
        """
        records: list[PassRecord] = []
        reference = example_outputs(exported) if self.check_numbers and exported.example_inputs is not None else None
        for step in self.passes:
            edit = Edit(exported, shared)
            edit.provenance = {"pass": step.name}
            nodes = len(exported.graph.nodes)
            before = Snapshot(exported)
            started = time.perf_counter()
            result = step.run(edit)
            try:
                _finish(edit, step.name)
                seconds = time.perf_counter() - started
                started = time.perf_counter()
                verify(exported, step.ensures, step.name, edit.touched)
                difference = self._difference(step, exported, reference) if result.changed else None
            except VerificationError as error:
                ran = ", ".join(record.name for record in records) or "none"
                raise VerificationError(f"{phase}: {error} (passes before: {ran})") from error
            record = PassRecord(
                step.name,
                phase,
                result.changed,
                nodes,
                len(exported.graph.nodes),
                seconds,
                time.perf_counter() - started,
                difference,
                result.refusals,
                before.undo(exported) if result.changed else None,
            )
            records.append(record)
            if self.on_pass is not None:
                self.on_pass(record, exported)
        return records

    def _difference(self, step: Pass, exported: ExportedProgram, reference: list[Tensor] | None) -> float | None:
        if not step.exact or reference is None:
            return None
        difference = largest_difference(reference, example_outputs(exported))
        limit = max(TOLERANCE[dtype] for dtype in _dtypes(exported))
        if not difference <= limit:
            raise VerificationError(
                f"after {step.name}: outputs differ by {difference:.2g} of their largest value, allowed {limit:g}"
            )
        return difference


def _finish(edit: Edit, name: str) -> None:
    try:
        edit.finish()
    except Exception as error:
        raise VerificationError(f"after {name}: {type(error).__name__}: {error}") from error


def _dtypes(exported: ExportedProgram) -> set[torch.dtype]:
    """The floating-point types that the program computes in; a program without weights has them too."""
    values = (node.meta.get("val") for node in exported.graph.nodes)
    computed = {value.dtype for value in values if isinstance(value, Tensor) and value.dtype in TOLERANCE}
    return computed or {torch.float32}


def _ordered(passes: Sequence[Pass]) -> list[Pass]:
    by_name = {step.name: step for step in passes}
    rank = {name: position for position, name in enumerate(by_name)}
    sorter = TopologicalSorter({step.name: {name for name in step.after if name in by_name} for step in passes})
    try:
        sorter.prepare()
    except CycleError as error:
        raise InvalidArgument(f"passes depend on each other in a circle: {' -> '.join(error.args[1])}") from error
    order: list[Pass] = []
    ready = list(sorter.get_ready())
    while ready:
        ready.sort(key=rank.__getitem__)
        name = ready.pop(0)
        order.append(by_name[name])
        sorter.done(name)
        ready.extend(sorter.get_ready())
    return order
