"""Which operators go to which target, as the README shows it: made from the registry, so that it cannot be wrong.

python -m graphwright.lowering.operator_table
"""

from __future__ import annotations

from ..kernels.contract import OPERATORS
from .registry import load, lowerings, refusal

COLUMNS = (
    ("PyTorch", "eager", ""),
    ("ONNX, portable", "onnx", "portable"),
    ("ONNX, ort", "onnx", "ort"),
    ("AOTInductor", "aoti", ""),
    ("TensorRT", "tensorrt", ""),
    ("TensorRT-RTX", "tensorrt_rtx", ""),
)
"""Heading, target and its choice of operators."""


def operator_table() -> str:
    """The table in Markdown: a row an operator, in each cell what it becomes when nothing forbids it, or "no"."""
    for _, target, _ in COLUMNS:
        load(target)
    lines = [f"| operator | {' | '.join(heading for heading, _, _ in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in sorted(OPERATORS):
        cells = [_cell(name, target, choice) for _, target, choice in COLUMNS]
        if cells[2] == cells[1] != "no":
            cells[2] = "the same"
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, target: str, choice: str) -> str:
    if refusal(name, target) is not None:
        return "no"
    return lowerings(name, target, choice)[0].becomes


if __name__ == "__main__":
    print(operator_table())
