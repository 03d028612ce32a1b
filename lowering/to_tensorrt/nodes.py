"""graphwright's operators as plugin nodes: a node for each kernel that the operator launches, with its sizes.

The nodes stand in the domain `trt.plugins`, where TensorRT's parser looks up a plugin by name, version and namespace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from ...kernels import block_sparse_attention_cuda as block_sparse
from ..registry import name_of
from .plugin import NAMESPACE, Expression, Integer, Plugin, Plugins, Tactic, Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "trt.plugins"
TOKENS = (1, 32, 64, 512, 4096)
"""Numbers of tokens whose best tiles are offered as tactics; TensorRT times them on the device."""
KINDS = {
    "FLOAT": ("FP32", "fp32"),
    "FLOAT16": ("FP16", "fp16"),
    "BFLOAT16": ("BF16", "bf16"),
    "INT8": ("INT8", "i8"),
    "UINT8": ("INT8", "u8"),
    "INT32": ("INT32", "i32"),
    "INT64": ("INT64", "i64"),
}
"""Type in ONNX -> in TensorRT, which has no arithmetic on bytes and takes them as INT8, and of Triton's elements."""


def plugin_translations(program: ExportedProgram, plugins: Plugins) -> dict[Any, Callable[..., Any]]:
    """Translations of the calls that were kept, for torch.onnx; they enter what they call in `plugins`."""
    emit = _Emit(plugins)
    kept = {node.target: name_of(node) for node in program.graph.nodes if name_of(node) is not None}
    return {overload: _function(getattr(emit, str(name))) for overload, name in kept.items()}


def pass_bytes_as_int8(model: ir.Model) -> None:
    """Give stored bytes that plugins read the type that TensorRT passes on."""
    import onnx_ir as ir

    for node in model.graph:
        for value in node.inputs if node.domain == DOMAIN else ():
            if value is not None and value.const_value is not None and value.dtype == ir.DataType.UINT8:
                stored = value.const_value.numpy().view("int8")
                value.const_value = ir.Tensor(stored, name=value.name)
                value.dtype = ir.DataType.INT8


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """torch.onnx writes to what it is given, which a bound method does not take."""

    def translate(*arguments: Any, **options: Any) -> Any:
        return method(*arguments, **options)

    return translate


class _Emit:
    """One method an operator, with its arguments, that makes nodes."""

    def __init__(self, plugins: Plugins) -> None:
        from onnxscript import opset23

        self._plugins = plugins
        self._op: Any = opset23

    def fake_quantize(self, x: Any, bits: int, group: int, clip: float = 1.0) -> Any:
        block = _power_of_two(group)
        together = max(1, 1024 // block)
        rows = ("//", ("numel", 0), group)
        constants = {"K": group, "CLIP": clip, "LEVELS": 2**bits - 1, "ROWS": together, "BLOCK": block}
        tactic = _tactic(constants, [("cdiv", rows, together)])
        return self._node("fake_quantize", [x], [Integer("M", rows)], [_like(x)], [tactic])

    def nm_sparsify(self, x: Any, factors: Any, n: int, m: int) -> Any:
        from ...kernels.nm_sparsify_triton import LENGTH, warps_of

        k = x.shape[-1]
        block = min(_power_of_two(k), LENGTH)
        constants = {"K": k, "KEPT": n, "WEIGHTED": factors is not None, "BLOCKS": block // m, "OF": m}
        tactic = _tactic(constants, [_rows(k), -(-k // block)], warps_of(block))
        return self._node("nm_sparsify", [x, x if factors is None else factors], [], [_like(x)], [tactic])

    def int8_linear(self, x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
        k = x.shape[-1]
        block = min(_power_of_two(k), 4096)
        tactic = _tactic({"BLOCK_K": block, "ONE_BLOCK": k <= block}, [_rows(k)])
        outputs = [_like(x, "INT8"), _tokens(x, "FLOAT")]
        quantized, step = self._node("quantize_tokens", [x], [_aligned("K", k)], outputs, [tactic])
        return self._int8_product(x, quantized, step, weight, scale, bias)

    def nm_int8_linear(self, x: Any, factors: Any, weight: Any, scale: Any, bias: Any, n: int, m: int) -> Any:
        from ...kernels.nm_int8_linear_triton import LONGEST
        from ...kernels.nm_sparsify_triton import warps_of

        k = x.shape[-1]
        block = min(_power_of_two(k), LONGEST)
        constants = {
            "K": k,
            "KEPT": n,
            "WEIGHTED": factors is not None,
            "BLOCKS": block // m,
            "OF": m,
            "ONE_BLOCK": k <= block,
        }
        inputs = [x, x if factors is None else factors]
        outputs = [_like(x, "INT8"), _tokens(x, "FLOAT")]
        tactic = _tactic(constants, [_rows(k)], warps_of(block))
        quantized, step = self._node("select_tokens", inputs, [], outputs, [tactic])
        return self._int8_product(x, quantized, step, weight, scale, bias)

    def _int8_product(self, x: Any, quantized: Any, step: Any, weight: Any, scale: Any, bias: Any) -> Any:
        from ...kernels.int8_linear import choose_config

        n, k = weight.shape
        tactics = []
        chosen = {m: choose_config(m, n, k) for m in TOKENS}
        for config, few in dict.fromkeys((config, m < config.block_m) for m, config in chosen.items()):
            constants = {
                "HAS_BIAS": bias is not None,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "EVEN_K": k % config.block_k == 0,
                "FEW": few,
            }
            grid = ("*", ("cdiv", _rows(k), config.block_m), -(-n // config.block_n))
            tactics.append(_tactic(constants, [grid], config.num_warps, config.num_stages))
        inputs = [quantized, step, weight, scale, scale if bias is None else bias]
        integers = [Integer("M", _rows(k)), _aligned("N", n), _aligned("K", k)]
        return self._node("int8_product", inputs, integers, [_wide(x, n)], tactics)

    def int4_linear(
        self,
        x: Any,
        weight: Any,
        steps: Any,
        scale: Any,
        sums: Any,
        bias: Any = None,
        bits: int = 8,
        clip: float = 1.0,
        hadamard: bool = False,
    ) -> Any:
        from ...kernels.int4_linear_triton import choose_config

        assert not hadamard
        k, n, group, channels = x.shape[-1], scale.shape[0], x.shape[-1] // steps.shape[0], steps.shape[1]
        block = _power_of_two(k)
        constants = {"CLIP": clip, "LEVELS": 2**bits - 1, "SHIFT": 128 if bits == 8 else 0, "BLOCK_K": block}
        tactic = _tactic(constants, [_rows(k)], 8 if block <= 8192 else 16)
        outputs = [_like(x, "INT8"), _tokens(x, "FLOAT"), _tokens(x, "INT32")]
        made = self._node("grid_tokens", [x], [_aligned("K", k)], outputs, [tactic])
        tactics = []
        for config in dict.fromkeys(choose_config(m, n, group) for m in TOKENS):
            sizes = {"BLOCK_M": config.block_m, "HALF": config.half, "BLOCK_K": config.block_k}
            grid = ("*", ("cdiv", _rows(k), config.block_m), -(-channels // (2 * config.half)))
            constants = {"HAS_BIAS": bias is not None, "GROUP": group, **sizes}
            tactics.append(_tactic(constants, [grid], config.num_warps, config.num_stages))
        inputs = [*made, weight, steps, scale, sums, scale if bias is None else bias]
        integers = [Integer("M", _rows(k)), _aligned("N", n), _aligned("K", k), _aligned("P", channels)]
        return self._node("int4_product", inputs, integers, [_wide(x, n)], tactics)

    def int4_weight_linear(self, x: Any, weight: Any, steps: Any, scale: Any, bias: Any = None) -> Any:
        from ...kernels.int4_linear_triton import choose_config

        k, n, group, channels = x.shape[-1], scale.shape[0], x.shape[-1] // steps.shape[0], steps.shape[1]
        tactics = []
        for config in (choose_config(m, n, group) for m in TOKENS):
            rows = min(config.block_m, 64)
            sizes = {"BLOCK_M": rows, "HALF": 32, "BLOCK_K": min(config.block_k, 64)}
            constants = {"HAS_BIAS": bias is not None, "GROUP": group, **sizes}
            grid = ("*", ("cdiv", _rows(k), rows), -(-channels // 64))
            tactics.append(_tactic(constants, [grid], 4, config.num_stages))
        inputs = [x, weight, steps, scale, scale if bias is None else bias]
        integers = [Integer("M", _rows(k)), _aligned("N", n), _aligned("K", k), _aligned("P", channels)]
        return self._node("int4_weight_product", inputs, integers, [_wide(x, n)], dict.fromkeys(tactics))

    def block_sparse_attention(
        self, *tensors: Any, key_blocks: int, block_size: int, scale: float | None = None
    ) -> Any:
        return self.block_sparse_attention_lse(*tensors, key_blocks=key_blocks, block_size=block_size, scale=scale)[0]

    def block_sparse_attention_lse(
        self,
        query: Any,
        key: Any,
        value: Any,
        counts: Any,
        blocks: Any,
        pattern: Any = None,
        order: Any = None,
        key_bias: Any = None,
        *,
        key_blocks: int,
        block_size: int,
        scale: float | None = None,
    ) -> Any:
        assert order is None
        batch, heads, queries, dim = query.shape
        keys, (rows, governed, listed) = key.shape[2], blocks.shape
        factor = dim**-0.5 if scale is None else scale
        # Tiles by pointers: the descriptors of the copy engine are made by the host, which TensorRT does not do.
        config = block_sparse.choose_config(dim, block_size, query.dtype.itemsize, (8, 0))
        constants = {
            "SCALE": max(factor * math.log2(math.e), 1e-20),
            "D": dim,
            "BLOCK_D": block_sparse.padded(dim),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_SIZE": block_size,
            "HAS_PATTERN": pattern is not None,
            "HAS_BIAS": key_bias is not None,
            "HAS_LSE": True,
            "WHOLE": key_blocks * block_size <= keys,
        }
        bias_strides = (0, 0) if key_bias is None else _strides(key_bias.shape)
        numbers = {
            "H": heads,
            "GROUP": heads // key.shape[1],
            "R": rows,
            "Q": governed,
            "KEY_PLACES": key_blocks * block_size,
            "N": queries,
            "M": keys,
            "LISTED": listed,
            "PATTERN_B": heads if pattern is not None and pattern.shape[0] > 1 else 0,
            "BIAS_B": bias_strides[0],
            "BIAS_H": bias_strides[1],
        }
        inputs = [query, key, value, counts, blocks, *(counts if x is None else x for x in (pattern, key_bias))]
        integers = [_aligned(name, number) for name, number in numbers.items()]
        outputs = [_like(query), _tensor("FLOAT", _shape(query)[:-1])]
        tactic = _tactic(
            constants, [batch * heads * -(-queries // config.block_m)], config.num_warps, config.num_stages
        )
        return self._node("attend", inputs, integers, outputs, [tactic])

    def snap_tokens(
        self, x: Any, theta: Any, groups: Sequence[int], factors: Sequence[float], *,
        frames: int, height: int, width: int, first: int, axes: Sequence[int], window: int, granularity: str,
    ) -> Any:  # fmt: skip
        from ...kernels.snap_tokens_triton import block_tokens

        batch, heads, tokens, channels = x.shape
        numbers = [0 if granularity == "token" else place for place, size in enumerate(groups) for _ in range(size)]
        factor = [value for value, size in zip(factors, groups, strict=True) for _ in range(size)]
        shared = {"element": 0, "group": len(groups), "token": 1}[granularity]
        count = -(-tokens // block_tokens(channels))
        outputs = [_like(x), _tensor("INT32", (batch, heads, count, channels))]
        grid = (frames, height, width, first)
        snapped, counts = self._snap("snap_tokens", x, theta, numbers, factor, grid, axes, window, shared, outputs)
        return snapped, self._op.ReduceSum(counts, self._op.Constant(value_ints=[2]), keepdims=0)

    def token_roots(
        self, x: Any, theta: Any, *, frames: int, height: int, width: int, first: int, axes: Sequence[int], window: int
    ) -> Any:
        channels, grid = x.shape[3], (frames, height, width, first)
        outputs = [_tensor("INT32", _shape(x)[:-1])]
        return self._snap("token_roots", x, theta, [0] * channels, [1.0] * channels, grid, axes, window, None, outputs)

    def _snap(
        self, entry: str, x: Any, theta: Any, numbers: list[int], factors: list[float], grid: Sequence[int],
        axes: Sequence[int], window: int, shared: int | None, outputs: list[Tensor],
    ) -> Any:  # fmt: skip
        from ...kernels.snap_tokens_triton import block_tokens

        batch, heads, tokens, channels = x.shape
        block = block_tokens(channels)
        constants = {
            "D": channels,
            "ALONG_T": 0 in axes,
            "ALONG_H": 1 in axes,
            "ALONG_W": 2 in axes,
            "WINDOW": window,
            **({} if shared is None else {"SHARED": shared}),
            "BLOCK_N": block,
            "BLOCK_D": _power_of_two(channels),
        }
        names = ("H", "N", "FRAMES", "HEIGHT", "WIDTH", "FIRST")
        integers = [Integer(name, number) for name, number in zip(names, (heads, tokens, *grid), strict=True)]
        stored = [self._constant(torch.tensor(numbers, dtype=torch.int32)), self._constant(torch.tensor(factors))]
        tactic = _tactic(constants, [-(-tokens // block), batch * heads])
        return self._node(entry, [x, theta, *stored], integers, outputs, [tactic])

    def _constant(self, tensor: torch.Tensor) -> Any:
        import onnx
        import onnx_ir as ir

        made = self._op.Constant(value=onnx.numpy_helper.from_array(tensor.numpy()))
        made.dtype = ir.DataType.INT32 if tensor.dtype == torch.int32 else ir.DataType.FLOAT
        return made

    def _node(
        self,
        entry: str,
        inputs: Sequence[Any],
        integers: Sequence[Integer],
        outputs: Sequence[Tensor],
        tactics: Iterable[Tactic],
    ) -> Any:
        """A node, and its plugin if there is none that is equal; one value, or as many as it has outputs."""
        import onnx
        import onnx_ir as ir
        from onnxscript import values

        given = tuple(_tensor(value.dtype.name) for value in inputs)
        plugin = Plugin(entry, given, tuple(integers), tuple(outputs), tuple(tactics))
        schema, formal = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
        types = sorted(onnx.defs.get_schema("Identity", 21).type_constraints[0].allowed_type_strs)
        letters = [f"T{place}" for place in range(len(inputs) + len(outputs))]
        declared = schema(
            self._plugins.name(plugin),
            DOMAIN,
            1,
            inputs=[formal(f"x{place}", letters[place]) for place in range(len(inputs))],
            outputs=[formal(f"y{place}", letters[len(inputs) + place]) for place in range(len(outputs))],
            type_constraints=[(letter, types, "") for letter in letters],
            attributes=[
                schema.Attribute(name, schema.AttrType.STRING, "", required=False)
                for name in ("plugin_version", "plugin_namespace")
            ],
        )
        call = values.Op(values.Opset(DOMAIN, 1), declared.name, declared)
        made: Any = call(*inputs, plugin_version="1", plugin_namespace=NAMESPACE)
        for value, output in zip(made if len(outputs) > 1 else [made], outputs, strict=True):
            value.dtype = next(ir.DataType[name] for name, kind in KINDS.items() if kind[0] == output.kind)
        return made


def _tensor(kind: str, shape: Sequence[Expression] = ()) -> Tensor:
    return Tensor(*KINDS[kind], tuple(shape))


def _shape(x: Any) -> list[Expression]:
    """The shape of an output like the node's first input: not as numbers, so that phases share plugins."""
    return [("size", 0, place) for place in range(len(x.shape))]


def _like(x: Any, kind: str = "") -> Tensor:
    return _tensor(kind or x.dtype.name, _shape(x))


def _tokens(x: Any, kind: str) -> Tensor:
    return _tensor(kind, _shape(x)[:-1])


def _wide(x: Any, n: int) -> Tensor:
    return _tensor(x.dtype.name, [*_shape(x)[:-1], n])


def _rows(k: int) -> Expression:
    return ("//", ("numel", 0), k)


def _aligned(name: str, number: int) -> Integer:
    return Integer(name, number, number % 16 == 0)


def _strides(shape: Sequence[int]) -> tuple[int, int]:
    """Of a bias [1|B, 1|H, M], 0 along dimensions of size 1."""
    batch, heads, places = shape
    return heads * places if batch > 1 else 0, places if heads > 1 else 0


def _tactic(constants: dict[str, Any], grid: Sequence[Expression], warps: int = 4, stages: int = 3) -> Tactic:
    return Tactic(tuple(constants.items()), tuple(grid), warps, stages)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
