"""From a module to a functional exported program, with what the host needs to call it.

`capture` takes any module, exported program or `.pt2` file. `capture_causal_lm` wraps a transformers decoder around a
static cache held in buffers; `capture_denoiser` takes a diffusers video transformer. All end in the exported dialect:
`torch.export` (strict=False), then `run_decompositions({})`, which makes the graph functional and keeps linear and
SDPA.
"""

from __future__ import annotations

import inspect
import json
import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .errors import CaptureError, InvalidArgument, InvalidFile, InvalidType, MissingExtra
from .patterns.graph import GraphView
from .phases import Condition, PhasePlan

MAIN = PhasePlan(name="main")


@dataclass(frozen=True)
class Captured:
    """A functional exported program and how it is to be used.

    Attributes:
        exported: The program, in the exported dialect.
        inputs: Names of the call's arguments, in order.
        plans: The phases to specialise it into, in the order in which their conditions are tried.
        kind: "module", "causal_lm" or "denoiser".
        facts: JSON-able facts about the model: cache length, configuration, latent grid...
    """

    exported: ExportedProgram
    inputs: tuple[str, ...]
    plans: tuple[PhasePlan, ...] = (MAIN,)
    kind: str = "module"
    facts: dict[str, Any] = field(default_factory=dict)


def capture(
    model: nn.Module | ExportedProgram | str | Path | Captured,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    trust: bool = False,
) -> Captured:
    """Bring a model into the exported dialect.

    Args:
        model: A module, an exported program, a path to a `.pt2` file, or what a `capture_*` function returned.
        args: Example positional inputs of a module.
        kwargs: Example keyword inputs of a module.
        dynamic_shapes: As in `torch.export.export`.
        trust: Let torch unpickle the sample inputs of a `.pt2` file, which can run code from it.

    Returns:
        The captured program.

    Raises:
        InvalidType: `model` is none of these, or args are not a tuple.
        InvalidFile: The file is missing, not a `.pt2`, or would have to be unpickled.
        CaptureError: Export failed; the message has torch's own reason. Or a weight is NaN or infinite.
    """
    if isinstance(model, Captured):
        return model
    if isinstance(model, str | Path):
        model = _load_pt2(Path(model), trust)
    if isinstance(model, ExportedProgram):
        _refuse_training(model)
        return _captured(_functional(model), _names(model))
    if not isinstance(model, nn.Module):
        raise InvalidType(f"expected a module, an ExportedProgram or a path to a .pt2 file, got {type(model).__name__}")
    if not isinstance(args, tuple):
        raise InvalidType(f"args must be a tuple of example inputs, got {type(args).__name__}")
    if model.training:
        raise CaptureError("the model is in training mode: call model.eval() first, so that dropout is off")
    exported = _export(model, args, dict(kwargs or {}), dynamic_shapes)
    return _captured(exported, _bound_names(model, args, kwargs or {}))


def capture_causal_lm(
    model: nn.Module, max_cache_len: int, batch_size: int = 1, *, logits_to_keep: int = 0
) -> Captured:
    """Capture a transformers decoder with a static key-value cache.

    The program is called with `input_ids` int64 [batch, tokens] and `cache_position` int64 [tokens] (consecutive), and
    returns logits [batch, tokens, vocabulary]. Its phases share weights and cache: `decode` takes one token, `prefill`
    starts at position 0, `extend` takes anything else.

    Args:
        model: A transformers model with a `config`, `input_ids`, `position_ids` and `past_key_values` in its forward.
        max_cache_len: Tokens that the cache holds.
        batch_size: Sequences that run together, all of one length.
        logits_to_keep: Compute logits for this many last tokens only; 0 for all, as in transformers.

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
    exported = _export(wrapper, (ids, position), {}, ({1: length}, {0: length}))
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
        "config": _config(model),
    }
    return _captured(exported, ("input_ids", "cache_position"), plans, "causal_lm", facts)


def capture_denoiser(
    model: nn.Module, inputs: Mapping[str, Any], *, timestep: str = "timestep", dynamic_frames: bool = False
) -> Captured:
    """Capture a diffusers video transformer, called with keywords and `return_dict=False`.

    Args:
        model: `WanTransformer3DModel`, `CogVideoXTransformer3DModel` and the like.
        inputs: Example keyword inputs, `hidden_states` [batch, channels, frames, height, width] among them.
        timestep: Name of the input that carries the denoising step.
        dynamic_frames: Keep the number of frames dynamic, as far as the model allows; at least 2 in the example.

    Returns:
        The captured program; `facts["grid"]` is the latent grid (frames, height, width) in tokens where the graph
        proves it, sizes that stay dynamic as None.

    Raises:
        InvalidArgument: There is no such timestep input.
        CaptureError: The model could not be exported.
    """
    inputs = {name: value for name, value in inputs.items() if name != "return_dict"}
    if timestep not in inputs:
        raise InvalidArgument(f"no input is called {timestep!r}; the inputs are {', '.join(inputs)}")
    dynamic: dict[str, Any] | None = None
    if dynamic_frames:
        axis = _frame_axis(inputs["hidden_states"], model)
        dynamic = {name: {axis: Dim.DYNAMIC} if name == "hidden_states" else None for name in inputs}
    wrapper = _Denoiser(model, tuple(inputs))
    exported = _export(wrapper.eval(), (), {"inputs": dict(inputs)}, {"inputs": dynamic} if dynamic else None)
    from .patterns.grid import find_grid

    grid = find_grid(GraphView(exported))
    facts = {"timestep": timestep, "grid": list(grid.sizes) if grid else None, "config": _config(model)}
    return _captured(exported, tuple(inputs), (MAIN,), "denoiser", facts)


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

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        from transformers import StaticCache

        cache = StaticCache(config=self._config, max_cache_len=self.get_buffer("key_cache_0").shape[2])
        cache.layers = [
            _BoundLayer.bind(
                self.get_buffer(f"key_cache_{index}"), self.get_buffer(f"value_cache_{index}"), cache_position
            )
            for index in range(self.layers)
        ]
        output = self.model(
            input_ids=input_ids,
            position_ids=cache_position[None],
            past_key_values=cache,
            use_cache=True,
            **self._extra,
        )
        return output.logits


class _Denoiser(nn.Module):
    """Calls a denoiser with keywords and takes the sample out of the tuple."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        return self.model(**inputs, return_dict=False)[0]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    _refuse_non_finite(model)
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__}:"
            f" {type(error).__name__}: {reason[0] if reason else ''}"
        ) from error
    return _functional(exported)


def _functional(exported: ExportedProgram) -> ExportedProgram:
    try:
        with _quiet():
            return exported.run_decompositions({})
    except Exception as error:
        raise CaptureError(
            "the exported program cannot be made functional:"
            f" {type(error).__name__}: {str(error).splitlines()[0]}."
            " Caches captured twice by strict=False are the usual cause;"
            " export with strict=True or use capture_causal_lm"
        ) from error


def _captured(
    exported: ExportedProgram,
    names: tuple[str, ...],
    plans: tuple[PhasePlan, ...] = (MAIN,),
    kind: str = "module",
    facts: dict[str, Any] | None = None,
) -> Captured:
    return Captured(exported, names, plans, kind, facts or {})


def _refuse_non_finite(model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            raise CaptureError(f"weight {name} holds NaN or infinite values")


def _bound_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(args)]
    names += [f"arg{i}" for i in range(len(names), len(args))]
    return (*names, *kwargs)


def _names(exported: ExportedProgram) -> tuple[str, ...]:
    """Names of the top-level arguments, from the call's structure and the placeholders."""
    args, kwargs = exported.example_inputs or ((), {})
    view = GraphView(exported)
    flat = [node.name for node in exported.graph.find_nodes(op="placeholder") if view.is_user_input(node)]
    if len(flat) == len(args) + len(kwargs):
        return (*flat[: len(args)], *kwargs)
    return (*(f"arg{i}" for i in range(len(args))), *kwargs)


def _refuse_training(exported: ExportedProgram) -> None:
    for node in exported.graph.nodes:
        if str(node.target) in ("aten.dropout.default", "aten.native_dropout.default", "aten.dropout_.default"):
            probability, training = (*node.args[1:3], True)[:2]
            if training and probability:
                raise CaptureError(f"{node.name} drops values: export the model after model.eval()")


def _require_dynamic(exported: ExportedProgram, name: str, dim: int) -> None:
    for node in exported.graph.find_nodes(op="placeholder"):
        if node.name == name and isinstance(node.meta["val"].shape[dim], int):
            raise CaptureError(
                f"the model fixes dimension {dim} of {name} at {node.meta['val'].shape[dim]} when it is exported;"
                " versions of transformers before 5 do that with static caches"
            )


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as plain JSON, {} where it has none."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(values, default=str))


def _frame_axis(hidden_states: Tensor, model: nn.Module) -> int:
    """CogVideoX orders its latents [batch, frames, channels, ...], the others [batch, channels, frames, ...]."""
    channels = getattr(getattr(model, "config", None), "in_channels", None)
    return 1 if hidden_states.shape[2] == channels and hidden_states.shape[1] != channels else 2


def _load_pt2(path: Path, trust: bool) -> ExportedProgram:
    if not path.is_file():
        raise InvalidFile(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise InvalidFile(f"{path}: not a .pt2 file (not a zip archive, or truncated)")
    with _no_pickle(path, trust):
        try:
            return torch.export.load(str(path))
        except InvalidFile:
            raise
        except Exception as error:
            raise InvalidFile(
                f"{path}: not a readable .pt2 file: {type(error).__name__}: {str(error)[:200]}"
            ) from error


@contextmanager
def _no_pickle(path: Path, trust: bool) -> Iterator[None]:
    """While open, torch.load only reads plain tensors: what would need unrestricted pickle is refused by name."""
    original = torch.load

    def safe_load(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("weights_only") is False:
            raise InvalidFile(
                f"{path}: its sample inputs can only be read by unpickling, which can run code;"
                " read it with gw.capture(path, trust=True)"
            )
        kwargs["weights_only"] = True
        return original(*args, **kwargs)

    # torch's warning that it fell back to unpickling lacks an argument (2.13): it would print a logging error instead.
    logger = logging.getLogger("torch._export.serde.serialize")
    disabled = logger.disabled
    if trust:
        logger.disabled = True
    else:
        torch.load = safe_load
    try:
        yield
    finally:
        torch.load, logger.disabled = original, disabled


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
