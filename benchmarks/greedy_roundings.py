"""How far greedy texts go with a rounded cache as with the full one: which way to round it keeps 95% of the tokens?

The module itself decodes, and each key and value is rounded once, when it is written; the prompt's own attention sees
full precision. So a rounding that no operator has can be judged before one is written.

A greedy text differs for good after its first other token. What tells roundings apart is therefore how often the most
probable token changes at one step of the *same* text, which is how often the two best are closer than the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from graphwright.kernels import hadamard
from graphwright.kernels.packed_cache import FORMS, GROUP, round_trip

Rounding = Callable[[Tensor], Tensor]


class Scheme(NamedTuple):
    """How keys and values [B, H, T, D] are rounded.

    Attributes:
        keys, values: The roundings.
        channel_bytes: What a channel takes, scales and all, mean of keys and values.
        whole: Whether they are given the whole cache in full precision, and not each call's new tokens.
    """

    keys: Rounding
    values: Rounding
    channel_bytes: float
    whole: bool = False


class Row(NamedTuple):
    """What a scheme did to the texts.

    Attributes:
        name: Of the scheme.
        tokens: Share of tokens that are the same at their place.
        until: Share of tokens before a text's first other one.
        texts: Texts that are the same to the end.
        steps: Share of steps of the full cache's texts at which the most probable token is the same.
        error: Root mean square of what the scheme adds to the distance of the two best logits, at these steps.
        close: Share of steps at which the two best are closer than that.
        of_float16: Bytes of the cache.
    """

    name: str
    tokens: float
    until: float
    texts: int
    steps: float
    error: float
    close: float
    of_float16: float


def greedy_roundings(model: Any, prompts: Tensor, tokens: int) -> Iterator[Row]:
    """One row a scheme, for greedy texts of so many tokens after prompts [B, P], P a multiple of 32."""
    full = Scheme(_same, _same, 4)
    wanted = _greedy(model, prompts, tokens, full)
    best = _forced(model, prompts, wanted, full).topk(2)
    gap = best.values[..., 0] - best.values[..., 1]
    for name, scheme in _schemes(model.config.head_dim).items():
        same = _greedy(model, prompts, tokens, scheme) == wanted
        logits = _forced(model, prompts, wanted, scheme)
        changed = logits.gather(-1, best.indices)
        error = (changed[..., 0] - changed[..., 1] - gap).square().mean().sqrt()
        yield Row(
            name,
            tokens=_share(same),
            until=_share(same.cumprod(-1)),
            texts=int(same.all(-1).sum()),
            steps=_share(logits.argmax(-1) == best.indices[..., 0]),
            error=float(error),
            close=_share(gap < error),
            of_float16=scheme.channel_bytes / 2,
        )


def _schemes(head_dim: int) -> dict[str, Scheme]:
    def rounded(bits: int, group: int = head_dim, scale_bytes: int = 2) -> Scheme:
        dtype = torch.float16 if scale_bytes == 2 else torch.float32
        function = partial(_asymmetric, bits=bits, group=group, dtype=dtype)
        return Scheme(function, function, bits / 8 + 2 * scale_bytes / group)

    def cast(dtype: torch.dtype) -> Scheme:
        return Scheme(lambda x: x.to(dtype).float(), lambda x: x.to(dtype).float(), 2)

    eight, sixteen = rounded(8), rounded(8, 16)
    keys, values = FORMS["kivi"]
    kivi = Scheme(partial(round_trip, bits=8, form=keys), partial(round_trip, bits=8, form=values), 1 + 4 / GROUP, True)
    half = (eight.channel_bytes + 2) / 2
    return {
        "float16": cast(torch.float16),
        "bfloat16": cast(torch.bfloat16),
        "8 bits, as per_token has them": eight,
        "the same, scales in float32": rounded(8, scale_bytes=4),
        "the same, keys alone (values full)": Scheme(eight.keys, _same, half),
        "the same, values alone (keys full)": Scheme(_same, eight.values, half),
        "8 bits, keys rotated": eight._replace(keys=_rotated(eight.keys)),
        "8 bits, 32 channels a scale": rounded(8, 32),
        "8 bits, 16 channels a scale": sixteen,
        "8 bits, keys rotated, 16 channels a scale": sixteen._replace(keys=_rotated(sixteen.keys)),
        "8 bits, as kivi has them (and 32 tokens in float16)": kivi,
        "9 bits": rounded(9),
        "10 bits": rounded(10),
        "12 bits": rounded(12),
    }


def _same(x: Tensor) -> Tensor:
    return x


def _rotated(rounding: Rounding) -> Rounding:
    return lambda x: hadamard.reference(rounding(hadamard.reference(x)))


def _asymmetric(x: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """`packed_cache.quantize` and back, for any bits and group."""
    grouped = x.unflatten(-1, (-1, group))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).to(dtype).float()
    low = low.to(dtype).float()
    codes = ((grouped - low) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + low).flatten(-2)


class _Rounded(DynamicCache):
    """A cache that keeps what a scheme makes of keys and values; a prompt attends to its own as they are."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme, self.prompt = scheme, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, scheme = (key_states, value_states), self.scheme
        if scheme.whole:
            keys, values = super().update(*new, *args, **kwargs)
            return new if self.prompt else (scheme.keys(keys), scheme.values(values))
        kept = super().update(scheme.keys(key_states), scheme.values(value_states), *args, **kwargs)
        return new if self.prompt else kept


def _greedy(model: Any, prompts: Tensor, tokens: int, scheme: Scheme) -> Tensor:
    """Texts [B, tokens], written token by token."""
    cache, text = _Rounded(scheme), []
    logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits
    cache.prompt = False
    for _ in range(tokens):
        text.append(logits[:, -1].argmax(-1, keepdim=True))
        logits = model(text[-1], past_key_values=cache).logits
    return torch.cat(text, -1)


def _forced(model: Any, prompts: Tensor, text: Tensor, scheme: Scheme) -> Tensor:
    """Logits [B, T, V] at the steps that wrote a text [B, T]; every query sees the rounded cache, its own token too.

    A call takes 32 tokens, which start at a multiple of 32: what `kivi` holds in float16 is then what decoding sees.
    """
    cache = _Rounded(scheme)
    logits = [model(prompts, past_key_values=cache, logits_to_keep=1).logits]
    cache.prompt = False
    logits += [model(part, past_key_values=cache).logits for part in text[:, :-1].split(GROUP, 1)]
    return torch.cat(logits, 1)


def _share(flags: Tensor) -> float:
    return float(flags.float().mean())
