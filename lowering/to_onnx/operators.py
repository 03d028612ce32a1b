"""What ONNX gets where an operator has no form of its own there: a body in ATen, which torch.onnx translates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...kernels.contract import Operator
from ..apply import REFERENCE, Body
from ..bodies.attention import (
    block_sparse_body,
    block_sparse_lse_body,
    snap_tokens_body,
    token_roots_body,
)
from ..bodies.cache import cache_append_body, quantized_cache_attention_body
from ..bodies.linear import (
    bitmask_linear_body,
    fake_quantize_body,
    int4_weight_linear_body,
    nm_linear_body,
    nm_sparsify_body,
)
from ..bodies.video import head_patterns_body, token_order_body, window_lists_body
from ..registry import Lowering, fallback, refuse, register
from ..traceable import traces
from .quantized import nm_int8_body

FORMULA = "its formula, in standard operators"


def _by_reference(operator: Operator) -> Lowering:
    return Lowering(operator.name, "onnx", FORMULA, REFERENCE, traces, -10)


BODIES: dict[str, Callable[..., Any]] = {
    "bitmask_linear": bitmask_linear_body,
    "block_sparse_attention": block_sparse_body,
    "block_sparse_attention_lse": block_sparse_lse_body,
    "cache_append": cache_append_body,
    "fake_quantize": fake_quantize_body,
    "head_patterns": head_patterns_body,
    "nm_int8_linear": nm_int8_body,
    "nm_linear": nm_linear_body,
    "nm_sparsify": nm_sparsify_body,
    "quantized_cache_attention": quantized_cache_attention_body,
    "snap_tokens": snap_tokens_body,
    "token_order": token_order_body,
    "token_roots": token_roots_body,
    "window_lists": window_lists_body,
}
BY_REFERENCE = ("attention_lse", "band_recall", "collapsed_attention")
"""Operators whose references trace as they are."""
SEARCH = "it measures for a search, and no optimized program calls it"

for _name, _body in BODIES.items():
    register(Lowering(_name, "onnx", FORMULA, Body(_body)))
register(
    Lowering(
        "int4_weight_linear", "onnx", f"{FORMULA}, unpacked when it runs", Body(int4_weight_linear_body), priority=-1
    )
)
for _name in BY_REFERENCE:
    register(Lowering(_name, "onnx", FORMULA, REFERENCE, traces))
refuse("tile_mass", "onnx", SEARCH)
fallback("onnx", _by_reference)
