"""Targets that take none of graphwright's operators: each is refused by name.

An operator is listed here, and not refused as a whole with the others, so that who adds one has to decide.
"""

from __future__ import annotations

from .registry import refuse

REFUSED = (
    "attention_lse",
    "band_recall",
    "bitmask_linear",
    "block_sparse_attention",
    "block_sparse_attention_lse",
    "cache_append",
    "collapsed_attention",
    "fake_quantize",
    "hadamard",
    "head_patterns",
    "int4_linear",
    "int4_weight_linear",
    "int8_linear",
    "nm_int8_linear",
    "nm_linear",
    "nm_sparsify",
    "page_append",
    "page_gather",
    "page_recall",
    "paged_attention",
    "quantized_cache_attention",
    "retrieved_attention",
    "snap_tokens",
    "tile_mass",
    "token_order",
    "token_roots",
    "window_cache_append",
    "window_cache_attention",
    "window_lists",
)
TARGETS = {
    "tensorrt": "graphwright has no TensorRT plugins; export .onnx with ops='portable': standard operators only",
    "tensorrt_rtx": "TensorRT-RTX takes no plugins; export .onnx with ops='portable': standard operators only",
}

for _target, _reason in TARGETS.items():
    for _name in REFUSED:
        refuse(_name, _target, _reason)
