"""Calls of every operator, small: activations are a program's inputs, weights its buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from graphwright.kernels import hadamard as rotation
from graphwright.kernels.bitmask_weights import compress
from graphwright.kernels.block_lists import lists_of
from graphwright.kernels.int4_weights import quantize_groups
from graphwright.kernels.int8_linear import quantize_per_channel
from graphwright.kernels.packed_cache import Packing
from graphwright.kernels.token_order import token_order
from graphwright.kernels.window_cache import slots_for
from graphwright.lowering.registry import load_operators

load_operators()
ops = torch.ops.graphwright


@dataclass
class Call:
    """A call: what is passed in, what is stored, which dimensions are dynamic, and how exact another target can be.

    `tolerance` is of the largest value: float32 rounding of the sums, 2^-24 times their length, with a margin.
    """

    call: Callable[..., Any]
    inputs: dict[str, Tensor]
    stored: dict[str, Tensor] = field(default_factory=dict)
    dynamic: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tolerance: float = 1e-5

    def program(self) -> ExportedProgram:
        """The call, exported as graphwright's programs are."""
        dynamic = tuple(dict.fromkeys(self.dynamic.get(name, ()), Dim.AUTO) for name in self.inputs)
        exported = torch.export.export(
            _Module(self).eval(), tuple(self.inputs.values()), dynamic_shapes={"tensors": dynamic}, strict=False
        )
        return exported.run_decompositions({})

    def expected(self) -> tuple[Tensor, ...]:
        """What the operator itself gives."""
        made = self.call(**self.inputs, **self.stored)
        return made if isinstance(made, tuple) else (made,)


class _Module(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call, self.names = call.call, list(call.inputs)
        self.stored = list(call.stored)
        for name in self.stored:
            self.register_buffer(name, call.stored[name])

    def forward(self, *tensors: Tensor) -> Any:
        stored = {name: self.get_buffer(name) for name in self.stored}
        return self.call(**dict(zip(self.names, tensors, strict=True)), **stored)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(rows: int, columns: int) -> dict[str, Tensor]:
    weight, scale = quantize_per_channel(normal(rows, columns, seed=1))
    return {"weight": weight, "scale": scale, "bias": normal(rows, seed=2)}


def int4(rows: int, columns: int, rotated: bool = False) -> dict[str, Tensor]:
    weight = normal(rows, columns, seed=1)
    packed = quantize_groups(rotation.reference(weight) if rotated else weight, 32)
    return {"weight": packed.packed, "steps": packed.steps, "scale": packed.scale, "sums": packed.sums}


def int4_plain(rows: int, columns: int) -> dict[str, Tensor]:
    made = int4(rows, columns)
    del made["sums"]
    return made


X = {"x": normal(2, 5, 96)}
TOKENS = {"x": (1,)}
FACTORS = {"factors": normal(96, seed=3).abs()}


def bitmask() -> dict[str, Tensor]:
    weight = normal(40, 96, seed=1)
    made = compress(torch.where(normal(40, 96, seed=4).abs() < 0.7, 0.0, weight))
    return dict(zip(("bits", "values", "starts"), made[:3], strict=True))


LINEAR = {
    "int8_linear": Call(ops.int8_linear, X, int8(40, 96), TOKENS),
    "int4_linear": Call(lambda **a: ops.int4_linear(**a, bits=8, clip=0.9), X, int4(40, 96), TOKENS),
    "int4_linear rotated": Call(lambda **a: ops.int4_linear(**a, bits=4, hadamard=True), X, int4(40, 96, True), TOKENS),
    "int4_weight_linear": Call(ops.int4_weight_linear, X, int4_plain(40, 96), TOKENS),
    "hadamard": Call(ops.hadamard, X, {}, TOKENS),
    "fake_quantize": Call(lambda x: ops.fake_quantize(x, 4, 32, 0.95), X, {}, TOKENS),
    "nm_sparsify": Call(lambda **a: ops.nm_sparsify(**a, n=8, m=16), X, FACTORS, TOKENS),
    "nm_linear": Call(
        lambda **a: ops.nm_linear(**a, n=2, m=4),
        X,
        {**FACTORS, "weight": normal(40, 96, seed=1), "bias": normal(40)},
        TOKENS,
    ),
    "nm_int8_linear": Call(lambda **a: ops.nm_int8_linear(**a, n=8, m=16), X, {**FACTORS, **int8(40, 96)}, TOKENS),
    "bitmask_linear": Call(ops.bitmask_linear, X, bitmask(), TOKENS),
}


def heads(length: int, heads: int = 4, seed: int = 0, dim: int = 32) -> Tensor:
    return normal(1, heads, length, dim, seed=seed)


QKV = {"query": heads(192), "key": heads(192, 2, 1), "value": heads(192, 2, 2)}
LONG = dict.fromkeys(QKV, (2,))
KEEP = torch.ones(4, 3, 3, dtype=torch.bool).tril()
LISTS = dict(zip(("counts", "blocks"), lists_of(KEEP), strict=True))
ORDER = {"order": token_order("frame_last", 3, 8, 8)[None]}
ROOTS = {
    "query_root": (torch.arange(192, dtype=torch.int32) // 2 * 2).expand(1, 4, 192).contiguous(),
    "key_root": (torch.arange(192, dtype=torch.int32) // 3 * 3).expand(1, 2, 192).contiguous(),
}
ATTENTION = {
    "attention_lse": Call(ops.attention_lse, QKV, {}, LONG),
    "block_sparse_attention": Call(
        lambda **a: ops.block_sparse_attention(**a, key_blocks=3, block_size=64), QKV, LISTS, {}
    ),
    "block_sparse_attention in an order": Call(
        lambda **a: ops.block_sparse_attention(**a, key_blocks=3, block_size=64), QKV, {**LISTS, **ORDER}, {}
    ),
    "block_sparse_attention_lse": Call(
        lambda **a: ops.block_sparse_attention_lse(**a, key_blocks=2, block_size=64), QKV,
        dict(zip(("counts", "blocks"), lists_of(KEEP[:, :2, :2]), strict=True)), {},
    ),
    "collapsed_attention": Call(ops.collapsed_attention, {**QKV, **ROOTS}, {}, {}),
    "band_recall": Call(
        ops.band_recall, {"query": heads(96), "key": heads(96, seed=1)},
        {"widths": torch.tensor([4, 20], dtype=torch.int32)}, {"query": (2,), "key": (2,)},
    ),
}  # fmt: skip

WINDOWS = torch.tensor([[[1, 1, 0, 2], [0, 1, 1, 1]], [[2, 0, 0, 1], [-1, -1, 0, 0]]], dtype=torch.int32)
GRID = {"frames": 4, "height": 8, "width": 8, "first": 0}


def by_frames(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call whose number of frames is a dimension of its input."""
    return lambda like: call(like, like.shape[0])


LIKE = {"like": normal(4, 3)}
FRAMES = {"like": (0,)}
SNAP = {"x": normal(1, 2, 256, 16) * 0.1 + normal(1, 2, 1, 16, seed=5)}
THETA = {"theta": torch.tensor([0.12])}
SHAPES = {"raster": [], "frame_last": [], "checkerboard": [3], "window": [4, 4], "tile": [2, 4, 4]}
SNAPPED = {**GRID, "axes": [0, 1, 2], "window": 2, "granularity": "group"}
VIDEO = {
    "window_lists": Call(lambda **a: ops.window_lists(**a, tiles=[3, 2, 4]), {"windows": WINDOWS}, {
        "group": torch.tensor([0, 1, 1], dtype=torch.int32)
    }),
    **{
        f"token_order {kind}": Call(
            by_frames(
                lambda like, frames, kind=kind, shape=shape: ops.token_order(
                    like, kind, frames, 9, 10, 2, 5, True, shape
                )
            ),
            LIKE, {}, FRAMES,
        )
        for kind, shape in SHAPES.items()
    },
    "head_patterns": Call(
        by_frames(lambda like, frames: ops.head_patterns(like, frames, 8, 8, 0, 3, 64, [0.3, 0.6], 2)), LIKE, {}, FRAMES
    ),
    "snap_tokens": Call(
        lambda **a: ops.snap_tokens(**a, groups=[4, 12], factors=[1.0, 0.5], **SNAPPED),
        SNAP, THETA,
    ),
    "token_roots": Call(lambda **a: ops.token_roots(**a, **GRID, axes=[0, 2], window=2), SNAP, THETA),
}  # fmt: skip


def store(bits: int, form: Any, tokens: int, written: int) -> Tensor:
    """A packed half cache of 64 tokens with some written."""
    made = torch.zeros(1, 2, Packing(bits, form, 32).bytes_for(tokens), dtype=torch.uint8)
    return ops.cache_append(made, torch.arange(written), normal(1, 2, written, 32, seed=7), bits, form)


def append(bits: int, form: str, first: int, count: int) -> Call:
    inputs = {
        "store": store(bits, form, 96, first),
        "positions": torch.arange(first, first + count),
        "new": normal(1, 2, count, 32, seed=8),
    }
    dynamic = {"positions": (0,), "new": (2,)} if count > 1 else {}
    return Call(lambda **a: ops.cache_append(**a, bits=bits, form=form), inputs, {}, dynamic, 0.0)


def attend(bits: int, mode: str, count: int) -> Call:
    forms = {"per_token": ("per_token", "per_token"), "kivi": ("per_channel", "per_group")}[mode]
    last = 70
    inputs = {
        "query": heads(count, 4, 9),
        "key": store(bits, forms[0], 96, last),
        "value": store(bits, forms[1], 96, last),
        "positions": torch.arange(last - count, last),
    }
    dynamic = {"query": (2,), "positions": (0,)} if count > 1 else {}
    options = {"key_bits": bits, "value_bits": bits, "mode": mode, "value_dim": 32, "scale": 0.2}
    return Call(lambda **a: ops.quantized_cache_attention(**a, **options), inputs, {}, dynamic)


CACHE = {
    "cache_append, a piece": append(8, "per_token", 3, 5),
    "cache_append, a token of 2 bits": append(2, "per_token", 3, 1),
    "cache_append, keys by channel": append(4, "per_channel", 30, 40),
    "cache_append, to the end": append(4, "per_channel", 60, 36),
    "cache_append, values by group": append(4, "per_group", 63, 1),
    "quantized_cache_attention": attend(8, "per_token", 6),
    "quantized_cache_attention, kivi": attend(4, "kivi", 1),
}


def windowed(first: int, count: int, starts: Tensor | None = None) -> dict[str, Tensor]:
    """Stores of 3 sinks and a ring of 12 tokens, `first` of which were written, and new tokens."""
    empty = torch.zeros(2, 2, slots_for(3, 12, torch.float32), 32)
    rows = {"positions": torch.arange(first, first + count), **({} if starts is None else {"starts": starts})}
    earlier = rows | {"positions": torch.arange(first)}
    stores = [
        ops.window_cache_append(empty, new=normal(2, 2, first, 32, seed=seed), sinks=3, **earlier) for seed in (10, 11)
    ]
    new = {"new_key": normal(2, 2, count, 32, seed=12), "new_value": normal(2, 2, count, 32, seed=13)}
    return {"key": stores[0], "value": stores[1], **new, **rows}


def window_append(first: int, count: int, starts: Tensor | None = None) -> Call:
    made = windowed(first, count, starts)
    inputs = {
        "store": made["key"],
        "new": made["new_key"],
        **{k: made[k] for k in ("positions", "starts") if k in made},
    }
    dynamic = {"positions": (0,), "new": (2,)} if count > 1 else {}
    return Call(lambda **a: ops.window_cache_append(**a, sinks=3), inputs, {}, dynamic)


def window_attend(first: int, count: int, starts: Tensor | None = None, slopes: bool = False) -> Call:
    inputs = {"query": normal(2, 4, count, 32, seed=9), **windowed(first, count, starts)}
    dynamic = {"query": (2,), "new_key": (2,), "new_value": (2,), "positions": (0,)} if count > 1 else {}
    stored = {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])} if slopes else {}
    return Call(
        lambda **a: ops.window_cache_attention(**a, sinks=3, scale=0.2, compensate=not slopes), inputs, stored, dynamic
    )


STARTS = torch.tensor([0, 4])
WINDOW_CACHE = {
    "window_cache_append, a token": window_append(30, 1),
    "window_cache_append, the first": window_append(0, 1),
    "window_cache_append, a piece that fills the ring": window_append(5, 20),
    "window_cache_append, padded": window_append(14, 3, STARTS),
    "window_cache_attention, a token": window_attend(30, 1),
    "window_cache_attention, a piece": window_attend(7, 9),
    "window_cache_attention, padded": window_attend(20, 3, STARTS),
    "window_cache_attention, slopes": window_attend(30, 3, slopes=True),
}
CALLS = LINEAR | ATTENTION | VIDEO | CACHE | WINDOW_CACHE
