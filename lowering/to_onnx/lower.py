"""Lower a program to ONNX: one stateless model, state as inputs and outputs, standard operators where they exist.

    attention         Attention, with is_causal and grouped heads        linear      MatMul
    RMSNorm           RMSNormalization                                   cache       ScatterND on the input itself
    rotary embedding  RotaryEmbedding                                    graphwright's operators: by `ops`

The translation of ATen is torch.onnx's; here is what comes before it (graphwright's operators, `registry.py`; state,
`state_io.py`) and after (`tidy.py`). `ops` says what graphwright's operators become:

    portable   standard operators
    ort        ONNX Runtime's own operators where they fit, else standard ones
    function   a node in the domain `graphwright` whose body is a function of the model: any runtime can run it, and one
               that knows the operator can replace it
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...errors import InvalidArgument, UnsupportedLowering
from ...passes.copy_exported import copy_exported
from ..apply import apply
from ..registry import Choice, choose_all, require
from ..state_io import Interface, without_state
from ..targets import Target, require_packages

if TYPE_CHECKING:
    import onnx_ir as ir

Ops = Literal["portable", "ort", "function"]
OPSETS = (23, 24)
Translations = Callable[[ExportedProgram], dict[Any, Callable[..., Any]]]
"""Of the operators that a program calls: operator -> a function that builds ONNX nodes for it."""


@dataclass(frozen=True)
class OnnxModel:
    """One lowered phase.

    Attributes:
        model: The model; its initializers share memory with the program where they are its tensors.
        interface: Names of inputs and outputs, and the state's first values.
        choices: What each of graphwright's operators became.
    """

    model: ir.Model
    interface: Interface
    choices: tuple[Choice, ...]


def check_options(opset: int, ops: str) -> None:
    """Refuse an opset or a choice of operators that does not exist.

    Raises:
        InvalidArgument: What was got and what there is.
    """
    if opset not in OPSETS:
        raise InvalidArgument(f"opset {opset} is out of range: graphwright writes {' and '.join(map(str, OPSETS))}")
    if ops not in get_args(Ops):
        raise InvalidArgument(f"ops must be one of {', '.join(get_args(Ops))}, got {ops!r}")


def plan(exported: ExportedProgram, ops: str = "portable") -> list[Choice]:
    """What each of graphwright's operators would become; nothing is built.

    Raises:
        InvalidArgument: `ops` does not exist.
    """
    check_options(OPSETS[0], ops)
    from .functions import as_functions

    if ops == "function":
        return as_functions(exported.graph.nodes)
    return choose_all(exported.graph.nodes, "onnx", ops)


def lower_onnx(
    exported: ExportedProgram,
    *,
    opset: int = 23,
    ops: str = "portable",
    shared: dict[str, Tensor] | None = None,
    target: Target = "onnx",
    kept: Translations | None = None,
) -> OnnxModel:
    """Lower one phase.

    Args:
        exported: A functional program; it is not changed.
        opset: 23 or 24.
        ops: What graphwright's operators become, see the module.
        shared: Tensors that lowering makes anew, by name, for the phases to share.
        target: Whose lowerings are taken: ONNX's own, or those of a target that reads ONNX.
        kept: Translations of the calls that the target's lowerings keep; nodes of functions by default.

    Raises:
        InvalidArgument: An opset or `ops` that does not exist.
        MissingExtra: onnx or onnxscript is not installed.
        UnsupportedLowering: An operator or a size that ONNX cannot take, by name.
    """
    check_options(opset, ops)
    require_packages("onnx")
    choices = plan(exported, ops) if target == "onnx" else choose_all(exported.graph.nodes, target)
    require(choices, target)
    program = copy_exported(exported)
    calls = {node.name: node for node in program.graph.nodes}
    own = [Choice(calls[choice.node.name], choice.lowering, choice.passed_over) for choice in choices]
    program, interface = without_state(apply(program, own, shared))
    model = translate(program, kept)
    if ops == "function":
        from .functions import attach

        attach(model, program, _lower_one)
    from .tidy import tidy

    tidy(model, interface, opset)
    return OnnxModel(model, interface, tuple(choices))


def _lower_one(program: ExportedProgram) -> ir.Model:
    """A program of one call, as the body of a function."""
    from .tidy import resolve

    choices = choose_all(program.graph.nodes, "onnx", "function")
    require(choices, "onnx")
    model = translate(apply(program, choices))
    resolve(model)
    return model


def translate(program: ExportedProgram, kept: Translations | None = None) -> ir.Model:
    """A stateless program of ATen, carriers and kept calls as a model of opset 23.

    Raises:
        UnsupportedLowering: torch.onnx has no translation of an operator.
    """
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    from .functions import function_translations
    from .translations import translations

    # Opset 24 extends types only, of what is emitted here; torch.onnx fuses rotary embeddings for 23 alone.
    table = translations() | (kept or function_translations)(program)
    with _quiet():
        try:
            made: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSETS[0],
                verbose=False,
                optimize=False,
                custom_translation_table=table,
            )
            # What torch.onnx does when it optimizes, but that constants are not folded into larger ones.
            optimizer.optimize_ir(made.model, should_fold=_may_fold)
            onnx_fusions.fuse(made.model)
        except Exception as error:  # torch.onnx wraps whatever went wrong in errors of its own
            raise UnsupportedLowering(f"onnx: {_first_cause(error)}") from error
    return made.model


def _may_fold(node: ir.Node) -> bool | None:
    """Whether a call on constants is computed now: None for onnxscript's own rules."""
    return False if node.op_type in ("Expand", "Tile") else None


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line] or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of torch.onnx and onnxscript on torchvision, on what is not folded, and on deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
