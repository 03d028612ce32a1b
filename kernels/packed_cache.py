"""How one half of a key-value cache lies in memory when it is packed to 8, 4 or 2 bits.

A store is uint8 [B, H, R]: for each sequence and head the bytes of all tokens, in planes that follow each other.

    codes   uint8   [C, D bits / 8]     byte c holds the channels c, c + D bits / 8, ..., low bits first
    steps   float16 [..., 2]            (scale, minimum) of each group of channels
    tail    float16 [32, D]             the tokens of the last block of 32; `per_channel` and `per_group` only

    minimum = min x,   scale = max(max x - min x, 1e-5) / (2^bits - 1)        over a group, both rounded to float16
    code    = clamp(round_half_even((x - minimum) / scale), 0, 2^bits - 1),   x' = code scale + minimum

What a group is depends on the form:

    per_token     all channels of one token;                  steps [C, 1, 2], no tail
    per_channel   one channel of a block of 32 tokens;        steps [C / 32, D, 2]
    per_group     32 channels of one token;                   steps [C, D / 32, 2]

The error of a channel is at most half a step of its group, and what rounding scale and minimum to float16 adds:
2^-11 (max |x| + max x - min x). Values beyond float16 (65504) become NaN.

Sources: asymmetric round to nearest and the floor of 1e-5: KVTuner (Li et al. 2025, arXiv 2502.04420), section 4.
Keys by channel over 32 tokens, values by 32 channels of a token, and a tail in 16 bits: KIVI (Liu et al. 2024, arXiv
2402.02750), sections 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import InvalidArgument

Form = Literal["per_token", "per_channel", "per_group"]
Mode = Literal["per_token", "kivi"]
BITS = (8, 4, 2)
GROUP = 32
"""Tokens or channels of a group, and tokens of the tail, in KIVI's forms."""
FORMS: dict[str, tuple[Form, Form]] = {"per_token": ("per_token", "per_token"), "kivi": ("per_channel", "per_group")}
"""Mode -> the forms of keys and of values."""
FLOOR = 1e-5
"""Least spread of a group."""


class Planes(NamedTuple):
    """The planes of a store, as views of it: codes [B, H, C, D bits / 8], steps [B, H, ..., 2], tail [B, H, 32, D]."""

    codes: Tensor
    steps: Tensor
    tail: Tensor | None


@dataclass(frozen=True)
class Packing:
    """How one half of a cache is packed.

    Attributes:
        bits: 8, 4 or 2.
        form: What a group is.
        head_dim: D, a multiple of 8; of 32 for `per_group`.
    """

    bits: int
    form: Form
    head_dim: int

    def refuse(self) -> str | None:
        """Why this cannot be, None where it can."""
        if self.bits not in BITS:
            return f"got {self.bits} bits, expected one of {', '.join(map(str, BITS))}"
        if self.form not in get_args(Form):
            return f"got form {self.form!r}, expected one of {', '.join(get_args(Form))}"
        multiple = GROUP if self.form == "per_group" else 8
        if self.head_dim < 1 or self.head_dim % multiple:
            return f"got head_dim {self.head_dim}, expected a multiple of {multiple}"
        return None

    def require(self) -> None:
        """`refuse`, with the reason raised as `InvalidArgument`."""
        if (reason := self.refuse()) is not None:
            raise InvalidArgument(f"packed cache: {reason}")

    @property
    def row(self) -> int:
        """Bytes of one token's codes."""
        return self.head_dim * self.bits // 8

    @property
    def has_tail(self) -> bool:
        """Whether the last block of tokens is kept in float16 too."""
        return self.form != "per_token"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, its share of the steps included and the tail left out."""
        shares = {"per_token": 4, "per_channel": 4 * self.head_dim // GROUP, "per_group": 4 * self.head_dim // GROUP}
        return self.row + shares[self.form]

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tail."""
        return 2 * GROUP * self.head_dim if self.has_tail else 0

    def bytes_for(self, tokens: int) -> int:
        """R, the bytes that a head needs to hold so many tokens."""
        capacity = -(-tokens // GROUP) * GROUP if self.has_tail else tokens
        return capacity * self.token_bytes + self.tail_bytes

    def capacity(self, size: int) -> int:
        """C, the tokens that R bytes hold.

        Raises:
            InvalidArgument: R is no size that `bytes_for` gives.
        """
        tokens = (size - self.tail_bytes) // self.token_bytes
        if tokens < 0 or self.bytes_for(tokens) != size:
            raise InvalidArgument(f"packed cache: {size} bytes a head hold no whole number of tokens")
        return tokens

    def planes(self, store: Tensor) -> Planes:
        """The planes of a store uint8 [B, H, R]."""
        tokens = self.capacity(store.shape[-1])
        codes, rest = store[..., : tokens * self.row], store[..., tokens * self.row :]
        steps = rest[..., : rest.shape[-1] - self.tail_bytes].view(torch.float16)
        sizes = (tokens // GROUP, self.head_dim, 2) if self.form == "per_channel" else (tokens, -1, 2)
        tail = rest[..., rest.shape[-1] - self.tail_bytes :].view(torch.float16)
        return Planes(
            codes.unflatten(-1, (tokens, self.row)),
            steps.unflatten(-1, sizes) if tokens else steps.reshape(*store.shape[:2], 0, 1, 2),
            tail.unflatten(-1, (GROUP, self.head_dim)) if self.has_tail else None,
        )


def packings(mode: str, key_bits: int, value_bits: int, head_dim: int, value_dim: int) -> tuple[Packing, Packing]:
    """How keys and values are packed in a mode.

    Raises:
        InvalidArgument: An unknown mode, or what a `Packing` refuses.
    """
    if mode not in FORMS:
        raise InvalidArgument(f"packed cache: got mode {mode!r}, expected {' or '.join(FORMS)}")
    key_form, value_form = FORMS[mode]
    both = Packing(key_bits, key_form, head_dim), Packing(value_bits, value_form, value_dim)
    for packing in both:
        packing.require()
    return both


def quantize(x: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., T, D bits / 8] and steps float16 [..., 2] of tokens [..., T, D] in any float dtype.

    T is a multiple of 32 for `per_channel`.
    """
    grouped, dim = _grouped(x.float(), packing)
    low, high = torch.aminmax(grouped, dim=dim, keepdim=True)
    most = 2**packing.bits - 1
    scale = ((high - low).clamp_min(FLOOR) / most).half()
    low = low.half()
    codes = ((grouped - low.float()) / scale.float()).round_().clamp_(0, most).to(torch.uint8)
    steps = torch.stack((scale, low), -1).squeeze(dim - 1)
    return pack(codes.reshape(x.shape), packing.bits), steps


def dequantize(codes: Tensor, steps: Tensor, packing: Packing) -> Tensor:
    """Tokens float32 [..., T, D] of their codes and steps, the inverse of `quantize` up to half a step."""
    values = unpack(codes, packing.bits).float()
    grouped, dim = _grouped(values, packing)
    scale, low = (part.unsqueeze(dim) for part in steps.float().unbind(-1))
    return torch.addcmul(low, grouped, scale).reshape(values.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., D] below 2^bits as bytes uint8 [..., D bits / 8]."""
    parts = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    packed = parts[0]
    for position, part in enumerate(parts[1:], 1):
        packed = packed | (part << (bits * position))
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)


def round_trip(x: Tensor, bits: int, form: Form) -> Tensor:
    """What a cache of tokens [..., T, D] gives back, float32, after all of them were appended.

    Of `per_channel` and `per_group` the tokens of the last block are the tail's.
    """
    packing = Packing(bits, form, x.shape[-1])
    packing.require()
    tokens = x.shape[-2]
    whole = (tokens - 1) // GROUP * GROUP if packing.has_tail else tokens
    rounded = x.half().float() if packing.has_tail else x.float()
    codes, steps = quantize(rounded[..., :whole, :], packing)
    return torch.cat([dequantize(codes, steps, packing), rounded[..., whole:, :]], -2)


def _grouped(x: Tensor, packing: Packing) -> tuple[Tensor, int]:
    """x with the members of a group in a dimension of their own, and that dimension, counted from the end."""
    if packing.form == "per_channel":
        return x.unflatten(-2, (x.shape[-2] // GROUP, GROUP)), -2
    size = GROUP if packing.form == "per_group" else packing.head_dim
    return x.unflatten(-1, (packing.head_dim // size, size)), -1
