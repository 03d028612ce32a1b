"""What TensorRT gets of each operator: plugin nodes over its Triton kernels, else what TensorRT-RTX gets.

A kernel becomes a plugin where TensorRT can call it (`entries.py`) and where the host needs to compute nothing between
kernels but sizes. What changes its input in place, or reads bytes that come from outside, has no plugin.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from ...kernels.contract import OPERATORS, Operator
from ...patterns.nodes import arguments
from ..apply import Keep, Rewrite
from ..bodies.rotation import ROTATE, known_width, rotate_first
from ..registry import Lowering, Validator, always, load_operators, lowerings, refusal, refuse, register
from ..to_onnx.quantized import stored_only

_CACHE = (
    "TensorRT computes nothing on bytes, and a packed cache is bytes that come from outside; export .onnx, or leave out"
    " the method that quantizes the cache"
)
REFUSED = {"cache_append": _CACHE, "quantized_cache_attention": _CACHE}


def _all_calls(validate: Validator) -> Validator:
    """Takes a call if all calls of its operator can be taken: a body would be traced into every one of them."""

    def check(node: Node, operator: Operator) -> str | None:
        for call in node.graph.find_nodes(op="call_function", target=node.target):
            if (reason := validate(call, operator)) is not None:
                return reason if call is node else f"of another call, {reason}"
        return None

    return check


def _fixed(node: Node, operator: Operator) -> str | None:
    """Its kernel takes sizes that are known now."""
    for name, value in arguments(node).items():
        if isinstance(value, Node) and not all(isinstance(size, int) for size in value.meta["val"].shape):
            return f"the sizes of its {name} are known when it runs only"
        if isinstance(value, Node) and 0 in value.meta["val"].shape:
            return f"its {name} is empty"
    return None


def _blocks_by_position(node: Node, operator: Operator) -> str | None:
    a = arguments(node)
    if a.get("order") is not None:
        return "its tokens are put in an order first, which takes kernels that the host starts"
    if (a.get("scale") or 0) < 0:
        return "its scale is negative"
    return _fixed(node, operator)


def _packed(node: Node, operator: Operator) -> str | None:
    return stored_only(node, operator) or (known_width(node, operator) if arguments(node).get("hadamard") else None)


def _plugins(*names: str) -> str:
    return f"{'plugin' if len(names) == 1 else 'plugins'} {' and '.join(names)}"


PLUGINS: dict[str, tuple[str, Validator, Any]] = {
    "block_sparse_attention": (_plugins("attend"), _all_calls(_blocks_by_position), Keep()),
    "block_sparse_attention_lse": (_plugins("attend"), _all_calls(_blocks_by_position), Keep()),
    "fake_quantize": (_plugins("fake_quantize"), always, Keep()),
    "int4_linear": (_plugins("grid_tokens", "int4_product"), _packed, Rewrite(rotate_first, ROTATE)),
    "int4_weight_linear": (_plugins("int4_weight_product"), _packed, Keep()),
    "int8_linear": (_plugins("quantize_tokens", "int8_product"), always, Keep()),
    "nm_int8_linear": (_plugins("select_tokens", "int8_product"), always, Keep()),
    "nm_sparsify": (_plugins("nm_sparsify"), always, Keep()),
    "snap_tokens": (_plugins("snap_tokens"), _all_calls(_fixed), Keep()),
    "token_roots": (_plugins("token_roots"), _all_calls(_fixed), Keep()),
}
"""Operator -> what a dry run prints, which calls it takes, and the emitter."""


load_operators()
for _name in OPERATORS:
    for _lowering in lowerings(_name, "tensorrt_rtx"):
        register(replace(_lowering, target="tensorrt"))
    _reason = REFUSED.get(_name) or refusal(_name, "tensorrt_rtx")
    if _reason is not None:
        refuse(_name, "tensorrt", _reason.replace("TensorRT-RTX", "TensorRT"))
for _name, (_becomes, _validate, _emit) in PLUGINS.items():
    register(Lowering(_name, "tensorrt", _becomes, _emit, _validate, 10))
