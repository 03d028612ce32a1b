"""Translations that torch.onnx lacks or does badly: writes to a cache, and the carriers of `onnx_carriers.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import onnx_carriers as _carriers  # noqa: F401 (registers them)

aten = torch.ops.aten
INT4_DOMAIN = "graphwright.int4"
"""Marks nodes whose first input is a packed initializer; `onnx_tidy.py` gives it the 4-bit type."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Operator -> a function that builds ONNX nodes for it, in opset 23."""
    import onnx
    from onnxscript import opset23 as op
    from onnxscript import values

    microsoft = values.Opset("com.microsoft", 1)
    marked = values.Opset(INT4_DOMAIN, 1)

    def schema(name: str, domain: str, inputs: list[str], attributes: list[str]) -> Any:
        formal, kind = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption
        options = [kind.Optional if text.endswith("?") else kind.Single for text in inputs]
        return onnx.defs.OpSchema(
            name,
            domain,
            1,
            inputs=[
                formal(text.rstrip("?"), f"T{place}", param_option=option)
                for place, (text, option) in enumerate(zip(inputs, options, strict=True))
            ],
            outputs=[formal("y", "T")],
            type_constraints=[(f"T{place}", _TENSORS, "") for place in range(len(inputs))] + [("T", _TENSORS, "")],
            attributes=[
                onnx.defs.OpSchema.Attribute(text, onnx.defs.OpSchema.AttrType.INT, "", required=False)
                for text in attributes
            ],
        )

    nbits = schema(
        "MatMulNBits",
        "com.microsoft",
        ["A", "B", "scales", "zero_points?", "g_idx?", "bias?"],
        ["K", "N", "bits", "block_size", "accuracy_level"],
    )
    dequantize = schema("Dequantize", INT4_DOMAIN, ["x", "scale"], ["k", "n"])
    cast = schema("Values", INT4_DOMAIN, ["x"], ["k", "n"])

    def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
        rank = len(self.shape)
        others = [axis for axis in range(rank) if axis != dim % rank]
        places = op.Expand(op.Unsqueeze(index, op.Constant(value_ints=others)), op.Shape(source))
        return op.ScatterElements(self, places, source, axis=dim)

    def matmul_nbits(
        x: Any, weight: Any, scale: Any, bias: Any, bits: int, block: int, k: int, n: int, accuracy: int
    ) -> Any:
        made = values.Op(microsoft, "MatMulNBits", nbits)(
            x, weight, scale, None, None, bias, K=k, N=n, bits=bits, block_size=block, accuracy_level=accuracy
        )
        made.dtype = x.dtype
        return made

    def int4_values(packed: Any, k: int, n: int) -> Any:
        return values.Op(marked, "Values", cast)(packed, k=k, n=n)

    def int4_floats(packed: Any, scale: Any, k: int, n: int) -> Any:
        return values.Op(marked, "Dequantize", dequantize)(packed, scale, k=k, n=n)

    carriers = torch.ops.graphwright_onnx
    return {
        aten.index_copy.default: index_copy,
        carriers.matmul_integer.default: lambda a, b: op.MatMulInteger(a, b),
        carriers.matmul_nbits.default: matmul_nbits,
        carriers.int4_values.default: int4_values,
        carriers.int4_floats.default: int4_floats,
    }


_TENSORS = [
    f"tensor({name})"
    for name in ("float", "float16", "bfloat16", "double", "int8", "uint8", "int16", "int32", "int64", "bool")
]
