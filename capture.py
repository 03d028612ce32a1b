"""From a module, an exported program or a `.pt2` file to a functional exported program.

All captures end in the exported dialect: `torch.export` (strict=False), then `run_decompositions({})`, which makes the
graph functional and keeps linear and SDPA. `capture_causal_lm.py` and `capture_denoiser.py` wrap models of one kind
first, and use `export_module` of this file.
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
from torch import nn
from torch.export import ExportedProgram

from .errors import CaptureError, InvalidFile, InvalidType
from .patterns.graph import GraphView
from .phases import PhasePlan

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
        return as_captured(_functional(model), _names(model))
    if not isinstance(model, nn.Module):
        raise InvalidType(f"expected a module, an ExportedProgram or a path to a .pt2 file, got {type(model).__name__}")
    if not isinstance(args, tuple):
        raise InvalidType(f"args must be a tuple of example inputs, got {type(args).__name__}")
    if model.training:
        raise CaptureError("the model is in training mode: call model.eval() first, so that dropout is off")
    exported = export_module(model, args, dict(kwargs or {}), dynamic_shapes)
    return as_captured(exported, _bound_names(model, args, kwargs or {}))


def export_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """Export and functionalise a module in evaluation mode.

    Raises:
        CaptureError: Export failed, or a weight is NaN or infinite.
    """
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


def as_captured(
    exported: ExportedProgram,
    names: tuple[str, ...],
    plans: tuple[PhasePlan, ...] = (MAIN,),
    kind: str = "module",
    facts: dict[str, Any] | None = None,
) -> Captured:
    """A `Captured`, with defaults filled in."""
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


def config_of(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as plain JSON, {} where it has none."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(values, default=str))


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
