"""The targets by name, what each writes, and the packages that each needs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..errors import InvalidArgument, MissingExtra

Target = Literal["eager", "aoti", "onnx", "tensorrt", "tensorrt_rtx"]

SUFFIXES: dict[str, Target] = {".onnx": "onnx", ".pt2": "aoti", ".engine": "tensorrt_rtx", ".zip": "tensorrt"}
"""Suffix of an exported file -> its target."""

_ONNX = ("onnx", "onnxscript", "onnx_ir")
PACKAGES: dict[str, dict[str, str]] = {
    "onnx": dict.fromkeys(_ONNX, "onnx"),
    "tensorrt": dict.fromkeys(("triton", *_ONNX), "tensorrt"),
    "tensorrt_rtx": dict.fromkeys(("tensorrt_rtx", *_ONNX), "tensorrt-rtx"),
}
"""Target -> the modules that it imports and the extra that brings each."""


def target_of(path: str | Path) -> Target:
    """The target that a file's suffix asks for.

    Raises:
        InvalidArgument: No target writes files with this suffix.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        known = ", ".join(f"{known} ({target})" for known, target in SUFFIXES.items())
        raise InvalidArgument(f"{path}: unknown suffix {suffix!r}; there are {known}")
    return SUFFIXES[suffix]


def require_packages(target: str) -> None:
    """Check that a target's packages are installed.

    Raises:
        MissingExtra: Names the package and the pip command that brings it.
    """
    for module, extra in PACKAGES.get(target, {}).items():
        if find_spec(module) is None:
            raise MissingExtra(f"{target} needs {module}: pip install 'graphwright[{extra}]'")
