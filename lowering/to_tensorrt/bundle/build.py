"""Builds a TensorRT engine of each phase, on the device that it is to run on.

python build.py --output engines
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path

import plugins
import tensorrt as trt

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Read the options, register the plugins, build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the engines")
    parser.add_argument("--phase", help="build this phase only")
    options = parser.parse_args()
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    phases = {phase["plan"]["name"]: phase for phase in manifest["phases"]}
    if options.phase is not None and options.phase not in phases:
        raise SystemExit(f"there is no phase {options.phase!r}; there are {', '.join(phases)}")
    if manifest["plugins"]:
        offered = list(manifest["plugins"][0]["tactics"][0]["kernels"])
        plugins.register_plugins(FOLDER, plugins.choose_architecture(*capability(), offered))
    options.output.mkdir(parents=True, exist_ok=True)
    for name in [options.phase] if options.phase else phases:
        path = options.output / Path(phases[name]["file"]).with_suffix(".engine")
        path.write_bytes(build(phases[name], manifest["tf32"]))
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def build(phase: dict, tf32: bool) -> bytes:
    """The engine of one phase."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(flags())
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(FOLDER / phase["file"])):
        raise SystemExit("\n".join(parser.get_error(place).desc() for place in range(parser.num_errors)))
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # How TensorRT's Python interface casts.
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if phase["sizes"]:
        profile = builder.create_optimization_profile()
        for name, ends in phase["sizes"].items():
            profile.set_shape(name, *ends)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SystemExit(f"{phase['file']}: TensorRT could not build it; the reason is above")
    return bytes(engine)


def flags() -> int:
    """Types as the model has them, and plugins as PTX; what later versions always do has no flag there."""
    known = trt.NetworkDefinitionCreationFlag.__members__
    names = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")
    return sum(1 << int(known[name]) for name in names if name in known)


def capability() -> tuple[int, int]:
    """The first device's compute capability, from the driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(value), 75, 0):
        raise SystemExit("there is no CUDA device")
    major = value.value
    driver.cuDeviceGetAttribute(ctypes.byref(value), 76, 0)
    return major, value.value


if __name__ == "__main__":
    main()
