"""ONNX models on disk that share one file of weights.

Weights are told apart by their bytes, so models share what is equal whatever it is called.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir

from ...errors import UnsupportedLowering

ALIGNMENT = 64
"""Bytes; what a mapped tensor should begin at for vector loads."""
INLINE = 512
"""Tensors of fewer bytes stay in the model's own file: shapes, scalars."""


def write_models(models: Mapping[str, ir.Model], folder: Path, data: str) -> None:
    """Write models that share their weights, and check them.

    Args:
        models: By the names of their files.
        folder: Where they go.
        data: Name of the file of weights, beside them.

    Raises:
        UnsupportedLowering: A model that the ONNX checker does not accept.
    """
    with open(folder / data, "wb") as stream:
        weights = _Weights(stream, data, folder)
        for model in models.values():
            weights.move(model)
        stream.flush()
        os.fsync(stream.fileno())
    for name, model in models.items():
        ir.save(model, folder / name)
        _check(folder / name)


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
                shape=ir.Shape(tensor.shape.numpy()),
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
