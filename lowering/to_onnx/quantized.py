"""Quantized linears in ONNX: what stays integer there, and ONNX Runtime's own operators where they fit.

    int8_linear           portable   tokens rounded by standard operators, MatMulInteger, scales
                          ort        the same, scaled as it is written: MatMulIntegerToFloat
    int4_weight_linear    portable   DequantizeLinear of a 4-bit weight in blocks, MatMul
                          ort        MatMulNBits, 4 bits
    int4_linear           portable   tokens rounded by standard operators, MatMulInteger with the 4-bit weight
                          ort        MatMulNBits, 4 bits, where tokens are kept in 8 bits

The portable forms compute what the operators compute. MatMulNBits of 8-bit tokens does not: ONNX Runtime rounds
activations in blocks instead of whole tokens, symmetrically, which is finer than the operator's own grid.

Source of the operators: the ONNX standard, opsets 10 and 21, and ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels.contract import Operator
from ...kernels.int4_weights import unpack
from ...passes.edit import Edit
from ...patterns.nodes import arguments
from ..apply import Body, Rewrite
from ..bodies.linear import int4_linear_with, nm_sparsify_body, on_grid, rounded_tokens, scaled
from ..bodies.rotation import ROTATE, rotate, rotate_first
from ..registry import Lowering, register
from .carriers import int4_values, matmul_integer, matmul_integer_to_float, pack_int4

aten = torch.ops.aten
_carriers = torch.ops.graphwright_onnx
ZERO = 128
"""What is added to signed integers to make them unsigned."""


def int8_body(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`int8_linear` with its integer product: x [..., K], weight int8 [N, K]."""
    quantized, step = _unsigned_tokens(x)
    y = matmul_integer(quantized, weight.t(), ZERO).float() * scale * step
    return (y if bias is None else y + bias.float()).to(x.dtype)


def int8_fused_body(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with ONNX Runtime's product that scales what it writes."""
    quantized, step = _unsigned_tokens(x)
    y = matmul_integer_to_float(quantized, weight.t(), scale, ZERO) * step
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _unsigned_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as uint8 [..., K], `ZERO` added, and their steps [..., 1]."""
    tokens, step = rounded_tokens(x)
    return (tokens + ZERO).to(torch.uint8), step


def nm_int8_body(
    x: Tensor, factors: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """`nm_int8_linear`: the selected channels through `int8_linear`."""
    return int8_body(nm_sparsify_body(x, factors, n, m), weight, scale, bias)


def int4_tokens_body(
    x: Tensor,
    packed: Tensor,
    steps: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    bits: int,
    clip: float,
) -> Tensor:
    """`int4_linear` with its integer product: x [..., K], steps int8 [K / g, 1, N], scale and sums float32 [N]."""
    n, k = scale.shape[0], x.shape[-1]
    tokens, step, zero = on_grid(x.float(), bits, clip)
    # In 32 bits, since runtimes have no product of 8-bit integers; all constant, so it is done once, when loading.
    values = int4_values(packed, k, n).to(torch.int32).view(steps.shape[0], -1, n) * steps.to(torch.int32)
    total = matmul_integer(tokens.to(torch.uint8), values.view(k, n).to(torch.int8), 0)
    return scaled(total, zero, sums, scale, step, bias, x.dtype)


int4_tokens = torch.library.custom_op("graphwright_onnx::int4_tokens", int4_tokens_body, mutates_args=())
"""Stands for `int4_tokens_body` until that is traced."""


@int4_tokens.register_fake
def _(x: Tensor, packed: Tensor, steps: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _portable_int4(edit: Edit, node: Node) -> Node:
    a = arguments(node)
    (_, n), packed = int4_buffer(edit, a)
    name, steps = edit.view.target(a["weight"]), edit.constant(a["steps"])
    by_group = edit.buffer(f"{name}.onnx_steps", lambda: steps[:, None, :n].contiguous())
    sums = edit.buffer(f"{name}.onnx_sums", lambda: edit.constant(a["sums"]).float())
    x = a["x"]
    if a["hadamard"]:
        x = rotate(edit, x, node)
    rest = (a["bias"], a["bits"], a["clip"])
    return edit.call(_carriers.int4_tokens.default, x, packed, by_group, a["scale"], sums, *rest, like=node)


def portable_int4_weight(edit: Edit, node: Node) -> Node:
    """`int4_weight_linear`, as `Rewrite` wants it: the weight stays in 4 bits."""
    a = arguments(node)
    (k, n), packed = int4_buffer(edit, a)
    dtype = a["x"].meta["val"].dtype
    name = edit.view.target(a["weight"])
    scale = edit.buffer(f"{name}.onnx_scale", lambda: _block_scale(edit, a, n).to(dtype).contiguous())
    weight = edit.call(_carriers.int4_floats.default, packed, scale, k, n, like=node)
    y = edit.call(aten.matmul.default, a["x"], weight, like=node)
    return y if a["bias"] is None else edit.call(aten.add.Tensor, y, _as(edit, a["bias"], dtype, node), like=node)


def int4_buffer(edit: Edit, a: dict[str, Any]) -> tuple[tuple[int, int], Node]:
    """K and N, and the 4-bit weight as ONNX packs it."""
    n = edit.constant(a["scale"]).shape[0]
    stored = edit.constant(a["weight"])
    name = edit.view.target(a["weight"])
    packed = edit.buffer(f"{name}.onnx_int4", lambda: pack_int4(_values(edit, a)))
    return (int(stored.shape[1]), int(n)), packed


def _values(edit: Edit, a: dict[str, Any]) -> Tensor:
    """q, int8 [K, N]."""
    n = edit.constant(a["scale"]).shape[0]
    return unpack(edit.constant(a["weight"]), torch.ones_like(edit.constant(a["steps"])))[:, :n]


def _block_scale(edit: Edit, a: dict[str, Any], n: int) -> Tensor:
    """step scale, float32 [K / g, N]."""
    return edit.constant(a["steps"])[:, :n].float() * edit.constant(a["scale"])


def _nbits_int4(edit: Edit, node: Node) -> Node:
    a = arguments(node)
    dtype, name = a["x"].meta["val"].dtype, edit.view.target(a["weight"])
    k, n = edit.constant(a["weight"]).shape[1], edit.constant(a["scale"]).shape[0]
    block = k // edit.constant(a["steps"]).shape[0]

    def packed() -> Tensor:
        values = (_values(edit, a).t() + 8).to(torch.uint8).reshape(n, k // block, block // 2, 2)
        return (values[..., 0] | (values[..., 1] << 4)).contiguous()

    weight = edit.buffer(f"{name}.nbits", packed)
    scale = edit.buffer(f"{name}.nbits_scale", lambda: _block_scale(edit, a, n).t().to(dtype).contiguous())
    x = rotate(edit, a["x"], node) if a.get("hadamard") else a["x"]
    return _nbits(edit, node, x, weight, scale, a["bias"], 4, block, 4 if "bits" in a else 0)


def _nbits(
    edit: Edit, node: Node, x: Node, weight: Node, scale: Node, bias: Node | None, bits: int, block: int, accuracy: int
) -> Node:
    n, blocks = weight.meta["val"].shape[:2]
    bias = None if bias is None else _as(edit, bias, x.meta["val"].dtype, node)
    rest = (bits, block, int(blocks) * block, int(n), accuracy)
    return edit.call(_carriers.matmul_nbits.default, x, weight, scale, bias, *rest, like=node)


def _as(edit: Edit, value: Node, dtype: torch.dtype, like: Node) -> Node:
    same = value.meta["val"].dtype == dtype
    return value if same else edit.call(aten.to.dtype, value, dtype, like=like)


def stored_only(node: Node, operator: Operator) -> str | None:
    """Packing anew needs the stored weight."""
    weight = arguments(node)["weight"]
    return None if weight.op == "placeholder" else f"its weight is computed by {weight.name}, not stored"


def _nbits_takes(node: Node, operator: Operator) -> str | None:
    a = arguments(node)
    if (reason := stored_only(node, operator)) is not None:
        return reason
    if a["x"].meta["val"].dtype == torch.bfloat16:
        return "ONNX Runtime has no MatMulNBits of bfloat16"
    if operator.name == "int4_linear" and a["bits"] != 8:
        return f"MatMulNBits rounds tokens to 8 bits, this call to {a['bits']}"
    return None


INT8, INT4 = "MatMulIntegerToFloat (com.microsoft) of rounded tokens", "MatMulNBits (com.microsoft), 4 bits"
STORED = ("portable", "ort")
"""Where weights are stored tensors: the body of a function has them as inputs."""

int4_linear_body = int4_linear_with(lambda values, weight: matmul_integer(values.to(torch.uint8), weight, 0))
_unpacked = Rewrite(rotate_first, {torch.ops.graphwright.int4_linear.default: int4_linear_body, **ROTATE})
_packed = Rewrite(_portable_int4, {_carriers.int4_tokens.default: int4_tokens_body, **ROTATE})
for _lowering in (
    Lowering("int8_linear", "onnx", "MatMulInteger of rounded tokens", Body(int8_body)),
    Lowering("int8_linear", "onnx", INT8, Body(int8_fused_body), priority=10, choices=("ort",)),
    Lowering("int4_linear", "onnx", "MatMulInteger, the weight unpacked when it runs", _unpacked, priority=-1),
    Lowering("int4_linear", "onnx", "MatMulInteger of a 4-bit weight", _packed, stored_only, choices=STORED),
    Lowering("int4_linear", "onnx", INT4, Rewrite(_nbits_int4, ROTATE), _nbits_takes, 10, ("ort",)),
    Lowering(
        "int4_weight_linear",
        "onnx",
        "DequantizeLinear of a 4-bit weight, MatMul",
        Rewrite(portable_int4_weight),
        stored_only,
        choices=STORED,
    ),
    Lowering("int4_weight_linear", "onnx", INT4, Rewrite(_nbits_int4), _nbits_takes, 10, ("ort",)),
):
    register(_lowering)
