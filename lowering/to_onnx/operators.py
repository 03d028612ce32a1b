"""What ONNX gets where an operator has no form of its own there: a body in ATen, which torch.onnx translates."""

from __future__ import annotations

from ...kernels.contract import Operator
from ..apply import REFERENCE, Body, Rewrite
from ..bodies.linear import int4_weight_linear_body
from ..bodies.portable import BODIES, BY_REFERENCE, PAGED, PAGES_MOVE
from ..bodies.rotation import ROTATE, known_width, rotate_call
from ..registry import Lowering, fallback, refuse, register
from ..traceable import traces
from .quantized import nm_int8_body

FORMULA = "its formula, in standard operators"


def _by_reference(operator: Operator) -> Lowering:
    return Lowering(operator.name, "onnx", FORMULA, REFERENCE, traces, -10)


SEARCH = "it measures for a search, and no optimized program calls it"

for _name, _body in BODIES.items():
    register(Lowering(_name, "onnx", FORMULA, Body(_body)))
register(
    Lowering(
        "int4_weight_linear", "onnx", f"{FORMULA}, unpacked when it runs", Body(int4_weight_linear_body), priority=-1
    )
)
register(Lowering("nm_int8_linear", "onnx", FORMULA, Body(nm_int8_body)))
register(Lowering("hadamard", "onnx", "MatMul by each factor", Rewrite(rotate_call, ROTATE), known_width))
for _name in BY_REFERENCE:
    register(Lowering(_name, "onnx", FORMULA, REFERENCE, traces))
refuse("tile_mass", "onnx", SEARCH)
for _name in PAGED:
    refuse(_name, "onnx", PAGES_MOVE)
fallback("onnx", _by_reference)
