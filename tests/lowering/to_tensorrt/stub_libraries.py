"""TensorRT's Python plugin API without its builder: PyPI's bindings over PyPI's lean runtime and empty stubs.

`tensorrt_cu13_bindings` wants the whole library, which PyPI does not have; `tensorrt_lean_cu13_libs` lacks a builder
and parsers. What is missing is defined here by functions that return nothing, which is enough to register plugins and
to have their signatures checked; nothing is built or run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

PARSER = ("getNvOnnxParserVersion", "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL")
BUILDER = ("initLibNvInferPlugins", "createInferBuilder_INTERNAL", "getBuilderPluginRegistry")
PACKAGES = {"tensorrt_bindings": "tensorrt_cu13_bindings", "tensorrt_lean_libs": "tensorrt_lean_cu13_libs"}
ALIAS = """
import sys, tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
import tensorrt_bindings.plugin
sys.modules["tensorrt.plugin"] = tensorrt_bindings.plugin
"""


def missing() -> str:
    """Why the bindings cannot be imported with stubs here, empty if they can."""
    absent = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        return f"not installed: pip install --no-deps {' '.join(absent)}"
    return "" if shutil.which("gcc") else "gcc is not installed"


def run_with_stubs(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own where `tensorrt` and `tensorrt.plugin` can be imported."""
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (lean,) = Path(spec.submodule_search_locations[0]).glob("libnvinfer_lean.so.*")
    version = lean.suffix
    (folder / f"libnvinfer.so{version}").symlink_to(lean)
    for library, names in {"libnvonnxparser": PARSER, "libnvinfer_plugin": BUILDER}.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void* {name}() {{ return 0; }}\n" for name in names))
        subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", folder / f"{library}.so{version}"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", ALIAS + code], env=environment, capture_output=True, text=True, check=False
    )
