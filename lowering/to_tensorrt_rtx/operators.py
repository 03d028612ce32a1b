"""What TensorRT-RTX gets of each operator: the standard operators of ONNX that its parser takes.

Found by building an engine of each (version 1.7). The parser has no arithmetic on bytes, and an 8-bit weight stands
before `DequantizeLinear` only: quantized linears are products of floats there, of whole numbers on the left.

    int8_linear           x rounded, DequantizeLinear of the 8-bit weight by row, MatMul
    int4_linear           x rounded, DequantizeLinear of the 4-bit weight by the steps, MatMul, scales
    int4_weight_linear    DequantizeLinear of the 4-bit weight in blocks, MatMul

TensorRT-RTX has no plugins that Python could add, so an operator without such a form is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ...passes.edit import Edit
from ...patterns.nodes import arguments
from ..apply import REFERENCE, Body, Rewrite
from ..bodies.linear import nm_sparsify_body, on_grid, rounded_tokens, scaled
from ..bodies.portable import BODIES, BY_REFERENCE, PAGED, PAGES_MOVE
from ..bodies.rotation import ROTATE, known_width, rotate, rotate_call
from ..registry import Lowering, refuse, register
from ..to_onnx.quantized import int4_buffer, portable_int4_weight, stored_only
from ..traceable import traces

FORMULA = "its formula, in standard operators"
BYTES = "TensorRT-RTX computes nothing on bytes, which {}; export .onnx, or leave {} out"
_nm_sparsify = torch.ops.graphwright.nm_sparsify.default
_carriers = torch.ops.graphwright_onnx


def int8_product_body(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`int8_linear` of tokens x [..., K] by a weight float32 [N, K] that holds its scales."""
    quantized, step = rounded_tokens(x)
    y = F.linear(quantized, weight) * step
    return (y if bias is None else y + bias.float()).to(x.dtype)


def int4_product_body(
    x: Tensor, weight: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, bits: int, clip: float
) -> Tensor:
    """`int4_linear` of tokens x [..., K] by whole numbers float32 [K, N], scale and sums float32 [N]."""
    tokens, step, zero = on_grid(x.float(), bits, clip)
    return scaled(tokens @ weight, zero, sums, scale, step, bias, x.dtype)


int8_product = torch.library.custom_op("graphwright_rtx::int8_product", int8_product_body, mutates_args=())
int4_product = torch.library.custom_op("graphwright_rtx::int4_product", int4_product_body, mutates_args=())
"""They stand for the bodies until those are traced."""


@int8_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@int4_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _int8(edit: Edit, node: Node) -> Node:
    a = arguments(node)
    x = a["x"]
    if "factors" in a:
        x = edit.call(_nm_sparsify, x, a["factors"], a["n"], a["m"], like=node)
    weight = edit.call(_carriers.int8_floats.default, a["weight"], a["scale"], like=node)
    return edit.call(torch.ops.graphwright_rtx.int8_product.default, x, weight, a["bias"], like=node)


def _int4(edit: Edit, node: Node) -> Node:
    a = arguments(node)
    (k, n), packed = int4_buffer(edit, a)
    name, steps = edit.view.target(a["weight"]), edit.constant(a["steps"])
    by_group = edit.buffer(f"{name}.float_steps", lambda: steps[:, :n].float().contiguous())
    sums = edit.buffer(f"{name}.onnx_sums", lambda: edit.constant(a["sums"]).float())
    weight = edit.call(_carriers.int4_floats.default, packed, by_group, k, n, like=node)
    x = rotate(edit, a["x"], node) if a["hadamard"] else a["x"]
    rest = (a["scale"], sums, a["bias"], a["bits"], a["clip"])
    return edit.call(torch.ops.graphwright_rtx.int4_product.default, x, weight, *rest, like=node)


_INT8 = {torch.ops.graphwright_rtx.int8_product.default: int8_product_body, _nm_sparsify: nm_sparsify_body}
_INT4 = {torch.ops.graphwright_rtx.int4_product.default: int4_product_body, **ROTATE}
WEIGHT8, WEIGHT4 = "DequantizeLinear of an 8-bit weight, MatMul", "DequantizeLinear of a 4-bit weight, MatMul"
REFUSED = {
    "bitmask_linear": BYTES.format("say which weights are kept", "the method that compresses them"),
    "cache_append": BYTES.format("a packed cache consists of", "the method that quantizes the cache"),
    "quantized_cache_attention": BYTES.format("a packed cache consists of", "the method that quantizes the cache"),
    "tile_mass": "it measures for a search, and no optimized program calls it",
} | dict.fromkeys(PAGED, PAGES_MOVE)


for _name, _body in BODIES.items():
    if _name not in REFUSED:
        register(Lowering(_name, "tensorrt_rtx", FORMULA, Body(_body)))
for _name in BY_REFERENCE:
    register(Lowering(_name, "tensorrt_rtx", FORMULA, REFERENCE, traces))
for _lowering in (
    Lowering("hadamard", "tensorrt_rtx", "MatMul by each factor", Rewrite(rotate_call, ROTATE), known_width),
    Lowering("int8_linear", "tensorrt_rtx", WEIGHT8, Rewrite(_int8, _INT8), stored_only),
    Lowering("nm_int8_linear", "tensorrt_rtx", WEIGHT8, Rewrite(_int8, _INT8), stored_only),
    Lowering("int4_linear", "tensorrt_rtx", WEIGHT4, Rewrite(_int4, _INT4), stored_only),
    Lowering("int4_weight_linear", "tensorrt_rtx", WEIGHT4, Rewrite(portable_int4_weight), stored_only),
):
    register(_lowering)
for _name, _reason in REFUSED.items():
    refuse(_name, "tensorrt_rtx", _reason)
