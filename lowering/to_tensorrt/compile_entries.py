"""Plugins to PTX, without a GPU: Triton compiles each tactic for each architecture.

Triton gives every kernel two more parameters, pointers to scratch memory that it allocates itself when it launches.
TensorRT would pass nothing there. No kernel here uses such memory, so they are cut off: what is left is what the plugin
passes, and it is counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UnsupportedLowering
from ...progress import Progress
from .plugin import Plugin, Plugins, Tactic

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Most bytes of shared memory that a block may take (CUDA programming guide, table of compute capabilities)."""
ARCHITECTURES = tuple(SHARED_MEMORY)


def compile_plugins(
    plugins: Plugins, architectures: tuple[int, ...], folder: Path, bar: Progress
) -> list[dict[str, Any]]:
    """Write the PTX of all plugins, and say how each is launched.

    Args:
        plugins: All of a program's.
        architectures: Compute capabilities such as 80.
        folder: Where the PTX goes.
        bar: Shows a step for each kernel.

    Raises:
        UnsupportedLowering: A kernel that Triton cannot compile, or that no device of an architecture could launch.

    Returns:
        The manifest's entry of each plugin.
    """
    kernels = {
        name: [_Kernel.of(plugin, tactic, number) for tactic in plugin.tactics for number in architectures]
        for name, plugin in plugins.by_name.items()
    }
    made: dict[_Kernel, dict[str, Any]] = {}
    distinct = dict.fromkeys(kernel for found in kernels.values() for kernel in found)
    with bar.stage("PTX", len(distinct)):
        for kernel in distinct:
            made[kernel] = _compile(kernel)
            same = sum(known.entry == kernel.entry and known.architecture == kernel.architecture for known in made)
            made[kernel]["file"] = f"{kernel.entry}.{same}.sm_{kernel.architecture}.ptx"
            (folder / made[kernel]["file"]).write_text(made[kernel].pop("ptx"), encoding="utf-8")
            bar.step(kernel.entry)
    return [_describe(name, plugin, made, architectures) for name, plugin in plugins.by_name.items()]


@dataclass(frozen=True)
class _Kernel:
    """What is compiled: plugins that differ in what they pass only have the same."""

    entry: str
    arguments: tuple[tuple[str, bool], ...]
    constants: tuple[tuple[str, int | float | bool], ...]
    num_warps: int
    num_stages: int
    architecture: int

    @classmethod
    def of(cls, plugin: Plugin, tactic: Tactic, architecture: int) -> _Kernel:
        """A plugin's kernel; the types of its arguments, and whether they are multiples of 16 (pointers always are)."""
        arguments = (
            *((f"*{tensor.element}", True) for tensor in plugin.inputs),
            *(("i32", integer.aligned) for integer in plugin.integers),
            *((f"*{tensor.element}", True) for tensor in plugin.outputs),
        )
        return cls(plugin.entry, arguments, tactic.constants, tactic.num_warps, tactic.num_stages, architecture)


def _describe(
    name: str, plugin: Plugin, made: dict[_Kernel, dict[str, Any]], architectures: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "name": name,
        "inputs": [tensor.kind for tensor in plugin.inputs],
        "integers": [{"name": integer.name, "value": integer.value} for integer in plugin.integers],
        "outputs": [{"type": tensor.kind, "shape": tensor.shape} for tensor in plugin.outputs],
        "tactics": [
            {
                "constants": dict(tactic.constants),
                "grid": tactic.grid,
                "kernels": {f"sm_{number}": made[_Kernel.of(plugin, tactic, number)] for number in architectures},
            }
            for tactic in plugin.tactics
        ],
    }


def _compile(kernel: _Kernel) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import entries

    function, constants, given = getattr(entries, kernel.entry), dict(kernel.constants), iter(kernel.arguments)
    signature, attributes = {}, {}
    for place, argument in enumerate(function.arg_names):
        signature[argument], aligned = ("constexpr", False) if argument in constants else next(given)
        if aligned:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    where = f"tensorrt: {kernel.entry} for sm_{kernel.architecture}"
    try:
        made: Any = triton.compile(source, target=GPUTarget("cuda", kernel.architecture, 32), options=options)
    except Exception as error:  # Triton's errors have no common base
        raise UnsupportedLowering(f"{where} does not compile: {str(error).strip().splitlines()[-1]}") from error
    if made.metadata.shared > SHARED_MEMORY[kernel.architecture]:
        raise UnsupportedLowering(f"{where} needs {made.metadata.shared} bytes of shared memory a block, too many")
    return {
        "entry": made.metadata.name,
        "parameters": len(kernel.arguments),
        "threads": 32 * made.metadata.num_warps,
        "shared_memory": made.metadata.shared,
        "ptx": without_scratch(made.asm["ptx"], made.metadata.name),
    }


def without_scratch(ptx: str, entry: str) -> str:
    """PTX whose entry lacks its last two parameters.

    Raises:
        UnsupportedLowering: The kernel reads them.
    """
    head = re.search(rf"\.entry {re.escape(entry)}\(\s*(.*?)\s*\)", ptx, re.DOTALL)
    assert head is not None
    parameters = [parameter.strip() for parameter in head[1].split(",")]
    cut = [parameter.split()[-1] for parameter in parameters[-2:]]
    if any(re.search(rf"\[{re.escape(name)}[\]+]", ptx) for name in cut):
        raise UnsupportedLowering(f"tensorrt: {entry} needs scratch memory, which TensorRT does not pass")
    return ptx[: head.start(1)] + ",\n\t".join(parameters[:-2]) + ptx[head.end(1) :]
