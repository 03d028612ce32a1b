"""Attention of new queries to a packed key-value cache.

    k'[j], v'[j] = dequantized key and value j             those of the query's own block of 32 from the tail, see below
    y[i] = sum_j softmax_j(scale q[i] . k'[j]) v'[j]       over positions[i] - window < j <= positions[i], starts <= j

Shapes: query ``[B, Hq, N, D]``; key and value stores ``[B, H, R]`` (``packed_cache.py``), H divides Hq, and query head
h reads head ``h H // Hq``; positions ``[N]``, consecutive, the new tokens' own, whose keys and values were appended
before; y ``[B, Hq, N, E]`` with E = ``value_dim``. Dtypes: query and y float32, float16 or bfloat16, stores uint8,
positions int64. Mode ``per_token`` packs keys and values by token, ``kivi`` keys by channel and values by groups of a
token. A window of 0 is none. ``starts`` int64 ``[B]`` is where each sequence begins: what lies before is padding, and a
query there, which sees nothing, gives zero.

With ``kivi`` the tokens from the last position's block on come from the tail, in float16, all earlier ones from the
packed blocks. For one new token, and for pieces of 32 that start at a multiple of 32, that is what decoding token by
token gives; queries of a longer piece see packed what decoding would have shown them in float16.

Error against attention to float keys and values: ``packed_cache.py``. Kernels differ from the reference by float32
rounding of sums of D and of positions[i] terms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .contract import FLOATS, Argument, Contract, Size, missing_kernel, register
from .packed_cache import GROUP, Packing, dequantize, packings
from .quantized_cache_attention_cpu import attend

CONTRACT = Contract(
    "quantized_cache_attention",
    {
        "query": Argument("B Q N D", FLOATS),
        "key": Argument("B H R", (torch.uint8,)),
        "value": Argument("B H S", (torch.uint8,)),
        "positions": Argument("N", (torch.int64,)),
        "starts": Argument("B", (torch.int64,), optional=True),
    },
    sizes={
        "Q": Size(minimum=1, multiple_of="H"),
        "D": Size(minimum=8, multiple_of=8),
        "value_dim": Size(minimum=8, multiple_of=8),
        "key_bits": Size(one_of=(8, 4, 2)),
        "value_bits": Size(one_of=(8, 4, 2)),
        "window": Size(minimum=0),
    },
)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    key_bits: int,
    value_bits: int,
    mode: str,
    value_dim: int,
    scale: float,
    window: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """The formula: everything dequantized, one softmax."""
    keys_as, values_as = packings(mode, key_bits, value_bits, int(query.shape[-1]), value_dim)
    cut = int(positions[-1]) // GROUP * GROUP if len(positions) else 0
    keys, values = _whole(key, keys_as, cut), _whole(value, values_as, cut)
    repeats = query.shape[1] // key.shape[1]
    scores = query.float() @ keys.repeat_interleave(repeats, 1).mT * scale
    j = torch.arange(keys.shape[2], device=query.device)
    hidden = j > positions[:, None]
    if window:
        hidden |= j <= positions[:, None] - window
    if starts is not None:
        hidden = hidden | (j < starts[:, None, None, None])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    # What was never written may be anything, and zero times NaN is no zero.
    written = (j <= positions.max())[:, None] if len(positions) else j[:, None] < 0
    values = torch.where(written, values.repeat_interleave(repeats, 1), 0.0)
    return (weights @ values).to(query.dtype)


def _whole(store: Tensor, packing: Packing, cut: int) -> Tensor:
    planes = packing.planes(store)
    tokens = dequantize(planes.codes, planes.steps, packing)
    if planes.tail is None:
        return tokens
    return torch.cat([tokens[:, :, :cut], planes.tail.float(), tokens[:, :, cut + GROUP :]], 2)


@torch.library.custom_op("graphwright::quantized_cache_attention", mutates_args=())
def quantized_cache_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    key_bits: int,
    value_bits: int,
    mode: str,
    value_dim: int,
    scale: float,
    window: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention of queries ``[B, Hq, N, D]`` to a packed cache, causal in positions ``[N]``, to ``[B, Hq, N, E]``.

    Keys before ``starts`` ``[B]``, if given, are hidden from their sequence.

    Raises:
        InvalidArgument: A dtype or shape that ``CONTRACT`` does not hold, or a position that the stores do not have.
        MissingKernel: No kernel for the query's device.
    """
    raise missing_kernel(CONTRACT.operator, query.device)


class _Call(NamedTuple):
    """The operator's arguments, as they are handed to its kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    key_bits: int
    value_bits: int
    mode: str
    value_dim: int
    scale: float
    window: int = 0
    starts: Tensor | None = None

    def require(self, proved: bool = True) -> tuple[Packing, Packing]:
        """How keys and values are packed, once all arguments were checked."""
        known = (*CONTRACT.arguments, *CONTRACT.sizes)
        given = {name: value for name, value in self._asdict().items() if name in known}
        CONTRACT.require(**given, proved=proved)
        return packings(self.mode, self.key_bits, self.value_bits, int(self.query.shape[-1]), self.value_dim)


@quantized_cache_attention.register_fake
def _fake(*arguments: Any, **named: Any) -> Tensor:
    call = _Call(*arguments, **named)
    call.require(proved=False)
    return call.query.new_empty((*call.query.shape[:3], call.value_dim))


def _cpu(*arguments: Any) -> Tensor:
    """In blocks: see ``quantized_cache_attention_cpu.py``."""
    call = _Call(*arguments)
    keys_as, values_as = call.require()
    positions = call.positions
    capacity = min(keys_as.capacity(call.key.shape[-1]), values_as.capacity(call.value.shape[-1]))
    if len(positions) and not 0 <= int(positions[0]) <= int(positions[-1]) < capacity:
        raise InvalidArgument(
            f"quantized_cache_attention: positions {int(positions[0])} to {int(positions[-1])}"
            f" do not fit a cache of {capacity} tokens"
        )
    planes = keys_as.planes(call.key), values_as.planes(call.value)
    return attend(call.query, *planes, positions, keys_as, values_as, call.scale, call.window, call.starts)


def _cuda(*arguments: Any) -> Tensor:
    """The Triton kernels; positions are not looked at, since reading them would wait for the device."""
    with CONTRACT.on_cuda(arguments[0].device):
        from .quantized_cache_attention_triton import launch

        _Call(*arguments).require()
        return launch(*arguments)


torch.library.impl("graphwright::quantized_cache_attention", "cpu", _cpu)
torch.library.impl("graphwright::quantized_cache_attention", "cuda", _cuda)
register(torch.ops.graphwright.quantized_cache_attention.default, reference, CONTRACT)
