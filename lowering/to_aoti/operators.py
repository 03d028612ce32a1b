"""What AOTInductor gets of each operator: its formula in ATen, which is compiled with the rest of the graph.

A custom operator of Python would need graphwright where the package runs, so none is left in the graph.
"""

from __future__ import annotations

import torch

from ...kernels.contract import Operator
from ..apply import REFERENCE, Body, Rewrite
from ..bodies.linear import (
    int4_linear_body,
    int4_weight_linear_body,
    int8_linear_body,
    nm_int8_linear_body,
)
from ..bodies.portable import BODIES, BY_REFERENCE, PAGED, PAGES_MOVE
from ..bodies.rotation import ROTATE, known_width, rotate_call, rotate_first
from ..registry import Lowering, fallback, refuse, register
from ..traceable import traces

FORMULA = "its formula, compiled"
FLOATS = {
    "int8_linear": int8_linear_body,
    "int4_weight_linear": int4_weight_linear_body,
    "nm_int8_linear": nm_int8_linear_body,
}


def _by_reference(operator: Operator) -> Lowering:
    return Lowering(operator.name, "aoti", FORMULA, REFERENCE, traces, -10)


for _name, _body in {**BODIES, **FLOATS}.items():
    register(Lowering(_name, "aoti", FORMULA, Body(_body)))
for _name in BY_REFERENCE:
    register(Lowering(_name, "aoti", FORMULA, REFERENCE, traces))
register(Lowering("hadamard", "aoti", "a product by each factor", Rewrite(rotate_call, ROTATE), known_width))
register(
    Lowering(
        "int4_linear",
        "aoti",
        FORMULA,
        Rewrite(rotate_first, {torch.ops.graphwright.int4_linear.default: int4_linear_body, **ROTATE}),
    )
)
refuse("tile_mass", "aoti", "it measures for a search, and no optimized program calls it")
for _name in PAGED:
    refuse(_name, "aoti", PAGES_MOVE)
fallback("aoti", _by_reference)
