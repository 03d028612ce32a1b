"""Plugins to PTX, without a GPU: Triton compiles each tactic for each architecture.

Triton gives every kernel two more parameters, pointers to scratch memory that it allocates itself when it launches.
TensorRT would pass nothing there. No kernel here uses such memory, so they are cut off: what is left is what the plugin
passes, and it is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UnsupportedLowering
from ...progress import Progress
from .plugin import Plugin, Plugins, Tactic

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Most bytes of shared memory that a block may take (CUDA programming guide, table of compute capabilities)."""
ARCHITECTURES = tuple(SHARED_MEMORY)


def compile_plugins(plugins: Plugins, architectures: tuple[int, ...], folder: Path, bar: Progress) -> list[dict[str, Any]]:
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
    total = len(architectures) * sum(len(plugin.tactics) for plugin in plugins.by_name.values())
    with bar.stage("PTX", total):
        return [_describe(name, plugin, architectures, folder, bar) for name, plugin in plugins.by_name.items()]


def _describe(
    name: str, plugin: Plugin, architectures: tuple[int, ...], folder: Path, bar: Progress
) -> dict[str, Any]:
    tactics = []
    for number, tactic in enumerate(plugin.tactics, 1):
        kernels = {}
        for architecture in architectures:
            made = _compile(plugin, tactic, architecture)
            file = f"{name}.{number}.sm_{architecture}.ptx"
            (folder / file).write_text(made.pop("ptx"), encoding="utf-8")
            kernels[f"sm_{architecture}"] = {"file": file, **made}
            bar.step(name)
        tactics.append({"constants": dict(tactic.constants), "grid": tactic.grid, "kernels": kernels})
    return {
        "name": name,
        "inputs": [tensor.kind for tensor in plugin.inputs],
        "integers": [{"name": integer.name, "value": integer.value} for integer in plugin.integers],
        "outputs": [{"type": tensor.kind, "shape": tensor.shape} for tensor in plugin.outputs],
        "parameters": len(plugin.inputs) + len(plugin.integers) + len(plugin.outputs),
        "tactics": tactics,
    }


def _compile(plugin: Plugin, tactic: Tactic, architecture: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import entries

    kernel = getattr(entries, plugin.entry)
    constants = dict(tactic.constants)
    given = _arguments(plugin)
    signature = {argument: "constexpr" if argument in constants else next(given) for argument in kernel.arg_names}
    aligned = {integer.name for integer in plugin.integers if integer.aligned}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in aligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tactic.num_warps, "num_stages": tactic.num_stages}
    where = f"tensorrt: {plugin.entry} for sm_{architecture}"
    try:
        made: Any = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # Triton's errors have no common base
        raise UnsupportedLowering(f"{where} does not compile: {str(error).strip().splitlines()[-1]}") from error
    if made.metadata.shared > SHARED_MEMORY[architecture]:
        raise UnsupportedLowering(f"{where} needs {made.metadata.shared} bytes of shared memory a block, too many")
    return {
        "entry": made.metadata.name,
        "threads": 32 * made.metadata.num_warps,
        "shared_memory": made.metadata.shared,
        "ptx": without_scratch(made.asm["ptx"], made.metadata.name),
    }


def _arguments(plugin: Plugin) -> Iterator[str]:
    yield from (f"*{tensor.element}" for tensor in plugin.inputs)
    yield from ("i32" for _ in plugin.integers)
    yield from (f"*{tensor.element}" for tensor in plugin.outputs)


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
