"""Translations that torch.onnx lacks or does badly: writes to a cache, and the carriers of `carriers.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import UnsupportedLowering
from . import carriers as _carriers  # noqa: F401 (registers them)

aten = torch.ops.aten
INT4_DOMAIN = "graphwright.int4"
"""Marks nodes whose first input is a packed initializer; `tidy.py` gives it the 4-bit type."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Operator -> a function that builds ONNX nodes for it, in opset 23."""
    import onnx
    import onnx_ir as ir
    from onnxscript import opset23, values

    # Its functions are typed for eager evaluation; here they make nodes.
    op: Any = opset23

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
    to_float = schema("MatMulIntegerToFloat", "com.microsoft", ["A", "B", "a_scale", "b_scale", "a_zero_point"], [])
    dequantize = schema("Dequantize", INT4_DOMAIN, ["x", "scale"], ["k", "n"])
    cast = schema("Values", INT4_DOMAIN, ["x"], ["k", "n"])

    def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
        rank = len(self.shape)
        leading = [self.shape[axis] for axis in range(dim % rank)]
        if leading and all(isinstance(size, int) for size in leading):
            # Whole slices are written, 16 to 64 numbers for an index; and the indices are the same in all layers.
            count = op.Shape(index)
            grid = torch.cartesian_prod(*map(torch.arange, leading)).reshape(*leading, 1, len(leading))
            fixed = op.Constant(value=onnx.numpy_helper.from_array(grid.numpy()))
            wide = op.Concat(op.Constant(value_ints=leading), count, op.Constant(value_ints=[len(leading)]), axis=0)
            at = op.Concat(op.Constant(value_ints=leading), count, op.Constant(value_ints=[1]), axis=0)
            moving = op.Expand(op.Unsqueeze(index, op.Constant(value_ints=[-1])), at)
            return op.ScatterND(self, op.Concat(op.Expand(fixed, wide), moving, axis=-1), source)
        others = [axis for axis in range(rank) if axis != dim % rank]
        places = op.Expand(op.Unsqueeze(index, op.Constant(value_ints=others)), op.Shape(source))
        return op.ScatterElements(self, places, source, axis=dim)

    def matmul_integer(a: Any, b: Any, zero: int) -> Any:
        if not zero:
            return op.MatMulInteger(a, b)
        return op.MatMulInteger(a, b, op.Constant(value=onnx.helper.make_tensor("", _UINT8, [], [zero])))

    def matmul_integer_to_float(a: Any, b: Any, scale: Any, zero: int) -> Any:
        one = op.Constant(value_float=1.0)
        at = op.Constant(value=onnx.helper.make_tensor("", _UINT8, [], [zero]))
        made: Any = values.Op(microsoft, "MatMulIntegerToFloat", to_float)(a, b, one, scale, at)
        made.dtype = ir.DataType.FLOAT
        return made

    def matmul_nbits(
        x: Any, weight: Any, scale: Any, bias: Any, bits: int, block: int, k: int, n: int, accuracy: int
    ) -> Any:
        made: Any = values.Op(microsoft, "MatMulNBits", nbits)(
            x, weight, scale, None, None, bias, K=k, N=n, bits=bits, block_size=block, accuracy_level=accuracy
        )
        made.dtype = x.dtype
        return made

    def int8_floats(weight: Any, scale: Any) -> Any:
        return op.DequantizeLinear(weight, scale, axis=0)

    def int4_values(packed: Any, k: int, n: int) -> Any:
        return values.Op(marked, "Values", cast)(packed, k=k, n=n)

    def int4_floats(packed: Any, scale: Any, k: int, n: int) -> Any:
        return values.Op(marked, "Dequantize", dequantize)(packed, scale, k=k, n=n)

    def view_dtype(self: Any, dtype: int) -> Any:
        wanted, given = ir.DataType(dtype), self.dtype
        if (given, wanted) == (ir.DataType.UINT8, ir.DataType.FLOAT16):
            return _halves(op, self)
        if (given, wanted) == (ir.DataType.FLOAT16, ir.DataType.UINT8):
            return _half_bytes(op, self)
        raise UnsupportedLowering(f"ONNX cannot read the bits of {given} as {wanted}")

    def shift(direction: str) -> Callable[[Any, Any], Any]:
        return lambda self, other: op.BitShift(self, op.CastLike(other, self), direction=direction)

    def bitwise_and(self: Any, other: Any) -> Any:
        return op.BitwiseAnd(self, op.CastLike(other, self))

    carriers = torch.ops.graphwright_onnx
    return {
        # torch.onnx has no shifts by operators, and gives numbers the wrong type in 8 bits.
        aten.__rshift__.Scalar: shift("RIGHT"),
        aten.__rshift__.Tensor: shift("RIGHT"),
        aten.__lshift__.Scalar: shift("LEFT"),
        aten.bitwise_and.Scalar: bitwise_and,
        aten.view.dtype: view_dtype,
        aten.index_copy.default: index_copy,
        carriers.matmul_integer.default: matmul_integer,
        carriers.matmul_integer_to_float.default: matmul_integer_to_float,
        carriers.matmul_nbits.default: matmul_nbits,
        carriers.int8_floats.default: int8_floats,
        carriers.int4_values.default: int4_values,
        carriers.int4_floats.default: int4_floats,
    }


def _halves(op: Any, x: Any) -> Any:
    """uint8 [..., 2 n] read as float16 [..., n], little-endian: sign and exponent by a table, the mantissa added."""
    pairs = op.Cast(op.Reshape(x, op.Concat(op.Shape(x, end=-1), op.Constant(value_ints=[-1, 2]), axis=0)), to=_INT32)
    low, high = (op.Gather(pairs, op.Constant(value_int=place), axis=-1) for place in (0, 1))
    kind = op.Div(high, op.Constant(value=_int32(4)))
    mantissa = op.Add(
        op.Mul(op.Sub(high, op.Mul(kind, op.Constant(value=_int32(4)))), op.Constant(value=_int32(256))), low
    )
    scale = [(-1.0 if place >= 32 else 1.0) * 2.0 ** (max(place % 32, 1) - 15) for place in range(64)]
    scale[31], scale[63] = float("inf"), float("-inf")
    share = op.Div(op.Cast(mantissa, to=_FLOAT), op.Constant(value_float=1024.0))
    whole = op.Add(op.Gather(op.Constant(value_floats=[float(place % 32 > 0) for place in range(64)]), kind), share)
    return op.Cast(op.Mul(whole, op.Gather(op.Constant(value_floats=scale), kind)), to=_HALF)


def _half_bytes(op: Any, x: Any) -> Any:
    """The inverse of `_halves`: the exponent is how many powers of two the value reaches."""
    value = op.Cast(x, to=_FLOAT)
    size = op.Min(op.Abs(value), op.Constant(value_float=65536.0))
    powers = op.Constant(value_floats=[2.0**power for power in range(-14, 17)])
    reached = op.GreaterOrEqual(op.Unsqueeze(size, op.Constant(value_ints=[-1])), powers)
    exponent = op.ReduceSum(op.Cast(reached, to=_INT32), op.Constant(value_ints=[-1]), keepdims=0)
    scales = op.Constant(value_floats=[2.0 ** (max(place, 1) - 15) for place in range(32)])
    mantissa = op.Mul(op.Div(size, op.Gather(scales, exponent)), op.Constant(value_float=1024.0))
    hidden = op.Mul(op.Cast(op.Min(exponent, op.Constant(value=_int32(1))), to=_FLOAT), op.Constant(value_float=1024.0))
    bits = op.Add(op.Mul(exponent, op.Constant(value=_int32(1024))), op.Cast(op.Sub(mantissa, hidden), to=_INT32))
    bits = op.Where(op.IsNaN(value), op.Constant(value=_int32(0x7E00)), bits)
    negative = op.Cast(op.Less(value, op.Constant(value_float=0.0)), to=_INT32)
    bits = op.Add(bits, op.Mul(negative, op.Constant(value=_int32(0x8000))))
    high = op.Div(bits, op.Constant(value=_int32(256)))
    low = op.Sub(bits, op.Mul(high, op.Constant(value=_int32(256))))
    last = op.Constant(value_ints=[-1])
    pairs = op.Cast(op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1), to=_UINT8)
    return op.Reshape(pairs, op.Concat(op.Shape(x, end=-1), last, axis=0))


def _int32(number: int) -> Any:
    from onnx import helper

    return helper.make_tensor("", _INT32, [], [number])


_FLOAT, _UINT8, _INT32, _HALF = 1, 2, 6, 10  # TensorProto.DataType
_TENSORS = [
    f"tensor({name})"
    for name in ("float", "float16", "bfloat16", "double", "int8", "uint8", "int16", "int32", "int64", "bool")
]
