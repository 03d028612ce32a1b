"""One engine from one ONNX model: TensorRT-RTX parses and builds on any machine, with or without a GPU."""

from __future__ import annotations

import importlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InvalidArgument, UnsupportedLowering
from ...progress import Progress
from ..engine_sizes import Profile

trt: Any = importlib.import_module("tensorrt_rtx")
"""Compiled, with no types that a checker could read."""


@dataclass(frozen=True)
class Engine:
    """What was built.

    Attributes:
        content: The engine, as bytes.
        layers: (name, kind) of each layer as parsed; the builder fuses them, which only a GPU can show.
        seconds: How long parsing and building took.
    """

    content: Any
    layers: list[tuple[str, str]]
    seconds: float


def check_capabilities(names: Sequence[str]) -> None:
    """Refuse compute capabilities that this TensorRT-RTX does not build for.

    Raises:
        InvalidArgument: What was got and what there is.
    """
    offered = sorted((name.lower() for name in trt.ComputeCapability.__members__ if name[-1].isdigit()), key=_number)
    for name in names:
        if name.replace("_", "") not in offered:
            known = ", ".join(f"sm_{_number(entry)}" for entry in offered)
            raise InvalidArgument(f"TensorRT-RTX {trt.__version__} builds for no {name!r}; there are {known}")
    if not names:
        raise InvalidArgument("compute_capabilities is empty: name at least one, such as 'sm_89'")


def build_engine(model: Path, profile: Profile, capabilities: Sequence[str], tf32: bool, bar: Progress) -> Engine:
    """Build an engine.

    Args:
        model: ONNX, with its weights beside it.
        profile: Least, usual and largest shape of each dynamic input.
        capabilities: Such as "sm_89"; one engine serves all of them.
        tf32: Let products of float32 round their factors to 10 bits of mantissa.
        bar: Shows the builder's steps.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the builder was stopped first.
        UnsupportedLowering: The parser or the builder refuses the model; the message has the node and the reason.
    """
    started = time.perf_counter()
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    _parse(network, log, model)
    _let_attention_decompose(network)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for place, name in enumerate(capabilities):
        config.set_compute_capability(trt.ComputeCapability.__members__[name.replace("_", "").upper()], place)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, ends in profile.items():
            shapes.set_shape(name, *ends)
        config.add_optimization_profile(shapes)
    monitor = _Monitor(bar)
    config.progress_monitor = monitor
    with bar.stage(model.stem), _stopped_by_ctrl_c(monitor):
        content = builder.build_serialized_network(network, config)
    if monitor.stopped:
        raise KeyboardInterrupt
    if content is None:
        raise UnsupportedLowering(f"tensorrt_rtx: {model.stem} cannot be built: {log.errors[-1] if log.errors else ''}")
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    kinds = [(layer.name, layer.type.name.lower()) for layer in layers]
    return Engine(content, kinds, time.perf_counter() - started)


def _parse(network: Any, log: _Log, model: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(model)):
        return
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    told = {f"{error.node_operator()} ({error.node_name()}): {_line(error.desc())}": None for error in errors}
    raise UnsupportedLowering(
        f"tensorrt_rtx: its parser refuses {len(told)} nodes of {model.stem}: {'; '.join(list(told)[:3])}. "
        "Export .onnx instead, or leave out the method that put them there"
    )


def _let_attention_decompose(network: Any) -> None:
    """Attention without a kernel of its own (float32, say) is built from products and a softmax, not refused."""
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # How its Python interface casts.
            layer.attention.decomposable = True


class _Log(trt.ILogger):
    """Keeps what went wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        """One message of the library."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(_line(msg))


class _Monitor(trt.IProgressMonitor):
    """Shows the builder's steps, and stops it when it is asked to."""

    def __init__(self, bar: Progress) -> None:
        super().__init__()
        self.stopped = False
        self._bar = bar

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """A part of the build begins."""
        self._bar.step(phase.lower(), 0)

    def step_complete(self, phase: str, step: int) -> bool:
        """A step is done; the answer is whether to go on."""
        self._bar.step()
        return not self.stopped

    def phase_finish(self, phase: str) -> None:
        """A part of the build has ended."""


@contextmanager
def _stopped_by_ctrl_c(monitor: _Monitor) -> Iterator[None]:
    """While the builder runs ctrl-C asks it to stop: an exception could not pass through it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        monitor.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _line(text: str) -> str:
    return " ".join(text.split())


def _number(name: str) -> int:
    return int(name.lower().removeprefix("sm").lstrip("_"))
