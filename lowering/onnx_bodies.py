"""What ONNX gets where an operator has no form of its own there: its reference, traced into ATen and translated."""

from __future__ import annotations

from ..kernels.contract import Operator
from .apply import Body
from .registry import Lowering, fallback
from .traceable import traces


def _by_reference(operator: Operator) -> Lowering:
    return Lowering(operator.name, "onnx", "its formula in standard operators", Body(operator.reference), traces, -10)


fallback("onnx", _by_reference)
