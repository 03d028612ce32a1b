"""The bodies of operators that all targets of ATen share: those that need no integer products of the target's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attention import block_sparse_body, block_sparse_lse_body, snap_tokens_body, token_roots_body
from .cache import cache_append_body, quantized_cache_attention_body
from .linear import bitmask_linear_body, fake_quantize_body, nm_linear_body, nm_sparsify_body
from .video import head_patterns_body, token_order_body, window_lists_body
from .window_cache import window_cache_append_body, window_cache_attention_body

BODIES: dict[str, Callable[..., Any]] = {
    "bitmask_linear": bitmask_linear_body,
    "block_sparse_attention": block_sparse_body,
    "block_sparse_attention_lse": block_sparse_lse_body,
    "cache_append": cache_append_body,
    "fake_quantize": fake_quantize_body,
    "head_patterns": head_patterns_body,
    "nm_linear": nm_linear_body,
    "nm_sparsify": nm_sparsify_body,
    "quantized_cache_attention": quantized_cache_attention_body,
    "snap_tokens": snap_tokens_body,
    "token_order": token_order_body,
    "token_roots": token_roots_body,
    "window_cache_append": window_cache_append_body,
    "window_cache_attention": window_cache_attention_body,
    "window_lists": window_lists_body,
}
PAGED = ("page_append", "page_gather", "page_recall", "paged_attention", "retrieved_attention")
"""Operators of an offloaded cache: they have no bodies."""
PAGES_MOVE = "pages move between memory and a file while it runs; export the program without FreeKV, or save it as .gw"
BY_REFERENCE = ("attention_lse", "band_recall", "collapsed_attention")
"""Operators whose references trace as they are."""
