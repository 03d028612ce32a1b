"""ONNX models on disk: one file a model, one file with all weights, and none of them half written.

    name.onnx          the most general model: the one whose condition is tried last
    name.PHASE.onnx    the others
    name.onnx.data     every weight once, whichever models read it

Weights are told apart by their bytes, so models share what is equal whatever it is called. Everything is written and
checked in a folder beside the target, then moved in place; an interrupted export leaves what was there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir

from ..errors import InvalidFile, UnsupportedLowering

ALIGNMENT = 64
"""Bytes; what a mapped tensor should begin at for vector loads."""
INLINE = 512
"""Tensors of fewer bytes stay in the model's own file: shapes, scalars."""


def write_models(models: Mapping[str, ir.Model], path: Path) -> list[Path]:
    """Write models that share their weights.

    Args:
        models: By name, the most general last.
        path: Where the last one goes.

    Returns:
        The files, weights first.

    Raises:
        InvalidFile: The path cannot be written.
        UnsupportedLowering: A model that the ONNX checker does not accept.
    """
    *others, general = models
    names = {name: f"{path.stem}.{name}{path.suffix}" for name in others} | {general: path.name}
    data = f"{path.name}.data"
    with replacing(path) as folder:
        with open(folder / data, "wb") as stream:
            weights = _Weights(stream, data, folder)
            for model in models.values():
                weights.move(model)
            stream.flush()
            os.fsync(stream.fileno())
        for name, model in models.items():
            ir.save(model, folder / names[name])
            _check(folder / names[name])
        files = [data, *names.values()]
    return [path.with_name(file) for file in files]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder beside `path`; its files are moved beside `path` when the block ends without an exception.

    Raises:
        InvalidFile: There is no such folder, or it cannot be written.
    """
    check_writable(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InvalidFile(f"{path}: {error.strerror or error}") from error
    try:
        yield folder
        # The file that was asked for comes last: while it is the old one, nothing has changed for who opens it.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise InvalidFile(f"{path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written before the work, not after.

    Raises:
        InvalidFile: Says what is wrong with it.
    """
    if path.is_dir():
        raise InvalidFile(f"{path}: is a directory")
    if not path.parent.is_dir():
        raise InvalidFile(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InvalidFile(f"{path}: the folder {path.parent} cannot be written")


class _Weights:
    """The file of weights as it grows."""

    def __init__(self, stream: IO[bytes], location: str, folder: Path) -> None:
        self._stream, self._location, self._folder = stream, location, folder
        self._places: dict[tuple[bytes, str], tuple[int, int]] = {}

    def move(self, model: ir.Model) -> None:
        """Write the model's large initializers, and let it refer to them."""
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE:
                continue
            offset, length = self._write(tensor)
            value.const_value = ir.ExternalTensor(
                self._location,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape([int(size) for size in tensor.shape]),
                name=name or "",
                base_dir=self._folder,
            )

    def _write(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        content = tensor.tobytes()
        key = (hashlib.blake2b(content).digest(), tensor.dtype.name)
        if key not in self._places:
            offset = self._stream.tell()
            padding = -offset % ALIGNMENT
            self._stream.write(bytes(padding))
            self._stream.write(content)
            self._places[key] = (offset + padding, len(content))
        return self._places[key]


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedLowering(f"onnx: the checker refuses {path.name}: {str(error).splitlines()[0]}") from error
