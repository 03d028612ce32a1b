"""A program as TensorRT-RTX engines, one a phase, and a description of how they are called.

name.engine                      the most general phase: the one whose condition is tried last
name.PHASE.engine                the others
name.engine.json                 phases, inputs and outputs, sizes, layers
name.engine.state.safetensors    what state starts from, where that is more than one number

Engines have no memory: state follows the inputs and the outputs, and what comes out is passed in at the next call. Each
holds its own copy of the weights it reads, and runs on every compute capability that it was built for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ...progress import Progress
from ...replace_files import replacing_files
from ..engine_description import describe_phase, describe_program
from ..engine_sizes import Sizes, check_sizes, profile
from ..source import Source
from ..targets import require_packages
from ..to_onnx.lower import lower_onnx
from ..to_onnx.write import state_file

CAPABILITIES = ("sm_86", "sm_89", "sm_120")
"""RTX cards since 2020: Ampere, Ada and Blackwell."""


def export(
    source: Source,
    path: Path,
    *,
    compute_capabilities: Sequence[str] = CAPABILITIES,
    sizes: Sizes | None = None,
    tf32: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Build an engine of every phase.

    Args:
        source: The program.
        path: Where the most general phase goes; the others get its name with theirs in it.
        compute_capabilities: What the engines run on, such as "sm_89".
        sizes: Input -> dimension -> (least, usual, largest), where the captured ranges are not wanted or not there.
        tf32: Let products of float32 round their factors to 10 bits of mantissa, which is faster.
        progress: Show a bar on a terminal.

    Returns:
        The files.

    Raises:
        InvalidArgument: A compute capability that is not offered, or sizes that do not fit.
        InvalidFile: The path cannot be written.
        MissingExtra: tensorrt_rtx is not installed.
        UnsupportedLowering: What TensorRT-RTX cannot take, by name.
    """
    require_packages("tensorrt_rtx")
    from ..to_onnx.models import write_models
    from .engine import build_engine, check_capabilities

    check_capabilities(compute_capabilities)
    sizes = sizes or {}
    check_sizes([phase.exported for phase in source.phases.values()], sizes)
    profiles = {name: profile(phase.exported, sizes) for name, phase in source.phases.items()}
    common, stored = describe_program(source)
    with replacing_files(path) as folder, Progress(progress) as bar:
        shared: dict[str, Tensor] = {}
        phases = []
        for name, file in source.files(path).items():
            made = lower_onnx(source.phases[name].exported, shared=shared, target="tensorrt_rtx")
            with tempfile.TemporaryDirectory(dir=folder) as models:
                write_models({f"{name}.onnx": made.model}, Path(models), "weights")
                engine = build_engine(Path(models, f"{name}.onnx"), profiles[name], compute_capabilities, tf32, bar)
            (folder / file).write_bytes(engine.content)
            layers = [{"name": layer, "kind": kind} for layer, kind in engine.layers]
            built = {"file": file, "seconds": round(engine.seconds, 2), "layers": layers}
            phases.append(describe_phase(source, name, made, profiles[name]) | built)
        document = common | {"compute_capabilities": list(compute_capabilities), "phases": phases}
        description_file(folder / path.name).write_text(json.dumps(document, indent=1), encoding="utf-8")
        if stored:
            safetensors.torch.save_file(stored, state_file(folder / path.name))
        return [path.with_name(file.name) for file in sorted(folder.iterdir())]


def description_file(path: Path) -> Path:
    """Where it stands how the engines are called."""
    return path.with_name(f"{path.name}.json")
