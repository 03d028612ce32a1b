"""What ONNX gets where an operator has no form of its own there: a body in ATen, which torch.onnx translates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..kernels.contract import Operator
from .apply import Body, arguments_of
from .bodies_cache import (
    cache_append_body,
    quantized_cache_attention_body,
    window_cache_append_body,
    window_cache_attention_body,
)
from .bodies_linear import (
    bitmask_linear_body,
    int4_weight_linear_body,
    nm_linear_body,
    nm_sparsify_body,
)
from .bodies_video import head_patterns_body, token_order_body, window_lists_body
from .onnx_quantized import nm_int8_body
from .registry import Lowering, always, fallback, refuse, register
from .traceable import traces

FORMULA = "its formula in standard operators"


def _by_reference(operator: Operator) -> Lowering:
    return Lowering(operator.name, "onnx", FORMULA, Body(operator.reference), traces, -10)


def _wide_mean(node: Node, operator: Operator) -> str | None:
    store = arguments_of(node)["store"].meta["val"]
    if store.dtype == torch.float32:
        return None
    return f"a store of {store.dtype} holds bits of float32, which ONNX cannot read; keep the cache in float32"


BODIES: dict[str, Callable[..., Any]] = {
    "bitmask_linear": bitmask_linear_body,
    "cache_append": cache_append_body,
    "head_patterns": head_patterns_body,
    "nm_int8_linear": nm_int8_body,
    "nm_linear": nm_linear_body,
    "nm_sparsify": nm_sparsify_body,
    "quantized_cache_attention": quantized_cache_attention_body,
    "token_order": token_order_body,
    "window_cache_append": window_cache_append_body,
    "window_cache_attention": window_cache_attention_body,
    "window_lists": window_lists_body,
}
BY_REFERENCE = (
    "attention_lse",
    "band_recall",
    "block_sparse_attention",
    "block_sparse_attention_lse",
    "collapsed_attention",
    "fake_quantize",
    "hadamard",
    "int4_linear",
    "int8_linear",
    "snap_tokens",
    "token_roots",
)
"""Operators whose references trace as they are."""
PAGED = ("page_append", "page_gather", "page_recall", "paged_attention", "retrieved_attention")
PAGES = (
    "pages are moved between memories while the program runs, which a model file has no operator for; run it in PyTorch"
)
SEARCH = "it measures for a search, and no optimized program calls it"

for _name, _body in BODIES.items():
    register(Lowering(_name, "onnx", FORMULA, Body(_body), _wide_mean if _name == "window_cache_append" else always))
register(
    Lowering(
        "int4_weight_linear", "onnx", f"{FORMULA}, unpacked when it runs", Body(int4_weight_linear_body), always, -1
    )
)
for _name in PAGED:
    refuse(_name, "onnx", PAGES)
refuse("tile_mass", "onnx", SEARCH)
fallback("onnx", _by_reference)
