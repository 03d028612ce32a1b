"""A program as a bundle for TensorRT: one .zip with all that builds its engines where TensorRT and a GPU are.

name.onnx, name.PHASE.onnx, name.onnx.data    the phases, with plugin nodes, over one file of weights
kernels/PLUGIN.TACTIC.sm_80.ptx               each plugin's kernel, for each tactic and architecture
manifest.json                                 phases, sizes, plugins: what is passed, grids, shared memory
plugins.py, build.py, README.md               what registers the plugins, builds the engines, and says how
name.onnx.state.safetensors                   what state starts from, where that is more than one number

TensorRT itself is not needed to write it: what is not on PyPI is needed where engines are built. Nothing in the bundle
imports graphwright, and no Python is left in an engine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ...errors import InvalidArgument
from ...progress import Progress
from ...replace_files import check_writable, replacing_file
from ..engine_description import describe_phase, describe_program
from ..engine_sizes import Sizes, check_sizes, profile
from ..source import Source
from ..targets import require_packages
from ..to_onnx.lower import lower_onnx
from ..to_onnx.write import state_file, weights_file
from .plugin import NAMESPACE, Plugins

BUNDLED = Path(__file__).with_name("bundle")
"""Files that every bundle has a copy of."""
ARCHITECTURES = ("sm_80", "sm_89", "sm_90")


def export(
    source: Source,
    path: Path,
    *,
    architectures: Sequence[str] = ARCHITECTURES,
    sizes: Sizes | None = None,
    tf32: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write a program's bundle.

    Args:
        source: The program.
        path: Of the .zip.
        architectures: What the plugins' kernels are compiled for.
        sizes: Input -> dimension -> (least, usual, largest), where the captured ranges are not wanted or not there.
        tf32: Let products of float32 round their factors to 10 bits of mantissa, which is faster.
        progress: Show a bar on a terminal.

    Returns:
        The file.

    Raises:
        InvalidArgument: An architecture that is not offered, or sizes that do not fit.
        InvalidFile: The path cannot be written.
        MissingExtra: onnx, onnxscript or triton is not installed.
        UnsupportedLowering: What TensorRT cannot take, by name.
    """
    require_packages("tensorrt")
    from ..to_onnx.models import write_models
    from .compile_entries import compile_plugins
    from .nodes import pass_bytes_as_int8, plugin_translations

    unknown = [name for name in architectures if name not in ARCHITECTURES]
    if unknown or not architectures:
        found = repr(unknown[0]) if unknown else "no architecture"
        raise InvalidArgument(f"kernels are compiled for {', '.join(ARCHITECTURES)}, got {found}")
    check_writable(path)
    sizes = sizes or {}
    check_sizes([phase.exported for phase in source.phases.values()], sizes)
    profiles = {name: profile(phase.exported, sizes) for name, phase in source.phases.items()}
    common, stored = describe_program(source)
    plugins, shared = Plugins(), dict[str, Tensor]()
    model = path.with_suffix(".onnx")
    with (
        replacing_file(path) as made,
        tempfile.TemporaryDirectory(dir=path.parent) as temporary,
        Progress(progress) as bar,
    ):
        folder = Path(temporary)
        models, phases = {}, []
        for name, file in source.files(model).items():
            lowered = lower_onnx(
                source.phases[name].exported,
                shared=shared,
                target="tensorrt",
                kept=lambda program: plugin_translations(program, plugins),
            )
            pass_bytes_as_int8(lowered.model)
            models[file] = lowered.model
            phases.append(describe_phase(source, name, lowered, profiles[name]) | {"file": file})
        write_models(models, folder, weights_file(model).name)
        kernels = folder / "kernels"
        kernels.mkdir()
        numbers = tuple(int(name.removeprefix("sm_")) for name in architectures)
        manifest = common | {
            "namespace": NAMESPACE,
            "tf32": tf32,
            "phases": phases,
            "plugins": compile_plugins(plugins, numbers, kernels, bar),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if stored:
            safetensors.torch.save_file(stored, state_file(folder / model.name))
        for file in BUNDLED.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        _zip(folder, made)
    return [path]


def _zip(folder: Path, path: Path) -> None:
    """All files of a folder, uncompressed: weights hardly get smaller."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
