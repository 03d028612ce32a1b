"""Capture of transformers decoders: one program over a static key-value cache that is held in buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .capture import Captured, as_captured, config_of, export_module
from .errors import CaptureError, InvalidArgument, MissingExtra
from .phases import Condition, PhasePlan


def capture_causal_lm(
    model: nn.Module, max_cache_len: int, batch_size: int = 1, *, logits_to_keep: int = 0, padding: bool = False
) -> Captured:
    """Capture a transformers decoder with a static key-value cache.

    The program is called with `input_ids` int64 [batch, tokens] and `cache_position` int64 [tokens] (consecutive), and
    returns logits [batch, tokens, vocabulary]. Its phases share weights and cache: `decode` takes one token, `prefill`
    starts at position 0, `extend` takes anything else.

    With `padding` sequences of different lengths run together, padded on the left. A third input, `starts` int64
    [batch], says where in the cache each sequence begins: no query sees a key before it, and the token at cache
    position p has position p - start in the model, as it has alone. (Rotary embeddings would not need that: rotating
    query and key by the angles of m and n, q . k depends on m - n only, so a shift of all positions changes nothing.
    Learned positions do.)

    Args:
        model: A transformers model with a `config`, `input_ids`, `position_ids` and `past_key_values` in its forward.
        max_cache_len: Tokens that the cache holds.
        batch_size: Sequences that run together, all of one length without `padding`.
        logits_to_keep: Compute logits for this many last tokens only; 0 for all, as in transformers.
        padding: Take `starts`. Attention then has a mask also where it could do with `is_causal`.

    Returns:
        The captured program.

    Raises:
        InvalidArgument: The cache is too short or the batch empty.
        CaptureError: The model keeps another kind of cache, or could not be exported.
        MissingExtra: transformers is not installed.
    """
    if max_cache_len < 4 or batch_size < 1:
        raise InvalidArgument(
            f"max_cache_len must be at least 4 and batch_size at least 1, got {max_cache_len} and {batch_size}"
        )
    wrapper = _StaticCacheModel(model, max_cache_len, batch_size, logits_to_keep).eval()
    tokens = min(8, max_cache_len - 1)
    device = next(model.parameters()).device
    ids = torch.arange(batch_size * tokens, device=device).reshape(batch_size, tokens) % wrapper.vocabulary
    position = torch.arange(tokens, device=device)
    length = Dim("tokens", min=2, max=max_cache_len)
    inputs = {"input_ids": (ids, {1: length}), "cache_position": (position, {0: length})}
    if padding:
        inputs["starts"] = (torch.zeros(batch_size, dtype=torch.int64, device=device), {})
    examples, dynamic = zip(*inputs.values(), strict=True)
    exported = export_module(wrapper, examples, {}, dynamic)
    _require_dynamic(exported, "input_ids", 1)
    decode = Condition(input="input_ids", measure="size", dim=1, at_least=1, at_most=1)
    empty = Condition(input="cache_position", measure="first", at_least=0, at_most=0)
    plans = (
        PhasePlan(name="decode", conditions=(decode,), sizes={"input_ids": {1: 1}, "cache_position": {0: 1}}),
        PhasePlan(name="prefill", conditions=(empty,), start_input="cache_position"),
        PhasePlan(name="extend"),
    )
    facts = {
        "max_cache_len": max_cache_len,
        "batch_size": batch_size,
        "logits_to_keep": logits_to_keep,
        "config": config_of(model),
    }
    return as_captured(exported, tuple(inputs), plans, "causal_lm", facts)


class _BoundLayer:
    """Makes transformers' static cache layer write into given buffers at given positions."""

    @staticmethod
    def bind(keys: Tensor, values: Tensor, position: Tensor) -> Any:
        from transformers.cache_utils import StaticLayer

        class Bound(StaticLayer):
            def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                assert self.keys is not None
                assert self.values is not None
                self.keys.index_copy_(2, position, key_states)
                self.values.index_copy_(2, position, value_states)
                return self.keys, self.values

        layer = Bound(max_cache_len=keys.shape[2])
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.batch_size, layer.num_heads = keys.shape[:2]
        layer.k_head_dim, layer.v_head_dim = keys.shape[-1], values.shape[-1]
        layer.cumulative_length = position[0].clone()
        layer.is_initialized = True
        return layer


class _StaticCacheModel(nn.Module):
    """A decoder and its cache as buffers: every layer keeps all `max_cache_len` positions; windows are masks."""

    def __init__(self, model: nn.Module, max_cache_len: int, batch_size: int, logits_to_keep: int) -> None:
        super().__init__()
        try:
            from transformers import StaticCache
        except ImportError as error:
            raise MissingExtra("transformers is not installed: pip install 'graphwright[demo]'") from error
        self.model = model
        text_config = model.config.get_text_config(decoder=True)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        self.vocabulary = int(text_config.vocab_size)
        self._config = text_config
        self._extra = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        probe = StaticCache(config=text_config, max_cache_len=max_cache_len)
        device = next(model.parameters()).device
        ids = torch.zeros(batch_size, 2, dtype=torch.int64, device=device)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=probe, use_cache=True)
        self.layers = len(probe.layers)
        for index, layer in enumerate(probe.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
                raise CaptureError(f"layer {index} keeps no key-value cache ({type(layer).__name__})")
            for name, tensor in (("key", keys), ("value", values)):
                shape = (batch_size, tensor.shape[1], max_cache_len, tensor.shape[3])
                self.register_buffer(f"{name}_cache_{index}", tensor.new_zeros(shape))

    def forward(self, input_ids: Tensor, cache_position: Tensor, starts: Tensor | None = None) -> Tensor:
        from transformers import StaticCache

        cache = StaticCache(config=self._config, max_cache_len=self.get_buffer("key_cache_0").shape[2])
        cache.layers = [
            _BoundLayer.bind(
                self.get_buffer(f"key_cache_{index}"), self.get_buffer(f"value_cache_{index}"), cache_position
            )
            for index in range(self.layers)
        ]
        position_ids = cache_position[None]
        extra: dict[str, Any] = dict(self._extra)
        if starts is not None:
            position_ids = (position_ids - starts[:, None]).clamp_min(0)
            slots = torch.arange(self.get_buffer("key_cache_0").shape[2], device=starts.device)
            extra["attention_mask"] = slots >= starts[:, None]
        output = self.model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, **extra
        )
        return output.logits


def _require_dynamic(exported: ExportedProgram, name: str, dim: int) -> None:
    for node in exported.graph.find_nodes(op="placeholder"):
        if node.name == name and isinstance(node.meta["val"].shape[dim], int):
            raise CaptureError(
                f"the model fixes dimension {dim} of {name} at {node.meta['val'].shape[dim]} when it is exported;"
                " versions of transformers before 5 do that with static caches"
            )
