"""A program as AOTInductor packages, one a phase: compiled code with its weights, which needs PyTorch and nothing else.

    package = torch._inductor.aoti_load_package("model.pt2")
    *outputs, state... = package(*inputs, *state)

Packages have no memory: state follows the inputs and the outputs, and what comes out is passed in at the next call. A
package's metadata names both. Each package holds its own copy of the weights it reads, and runs on the device that it
was compiled on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...errors import MissingExtra, UnsupportedLowering
from ...passes.copy_exported import copy_exported
from ...replace_files import replacing_files
from ...torch_private import compile_package, pytree
from ..apply import apply
from ..registry import Choice, choose_all, name_of, require
from ..source import Source
from ..state_io import Interface, without_state


def export(source: Source, path: Path) -> list[Path]:
    """Compile every phase.

    Args:
        source: The program.
        path: Where the most general phase goes; the others get its name with theirs in it.

    Returns:
        The files.

    Raises:
        InvalidFile: The path cannot be written.
        MissingExtra: There is no C++ compiler.
        UnsupportedLowering: An operator that has no traceable form, or that the compiler does not take.
    """
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise MissingExtra("aoti needs a C++ compiler: install g++ or clang++")
    with replacing_files(path) as folder:
        for name, phase in source.phases.items():
            program, interface = lower_aoti(phase.exported)
            program.example_inputs = (_examples(phase.exported, interface), {})
            names = {"inputs": interface.input_names, "outputs": interface.output_names}
            try:
                compile_package(program, folder / source.files(path)[name], {"graphwright": json.dumps(names)})
            except RuntimeError as error:  # inductor's errors derive from it
                raise UnsupportedLowering(f"aoti: {name}: {str(error).strip().splitlines()[0]}") from error
        return [path.with_name(file.name) for file in sorted(folder.iterdir())]


def lower_aoti(exported: ExportedProgram) -> tuple[ExportedProgram, Interface]:
    """A phase in ATen alone, with its state passed in and out.

    Raises:
        UnsupportedLowering: An operator that has no traceable form, by name.
    """
    program = copy_exported(exported)
    choices: list[Choice] = choose_all(program.graph.nodes, "aoti")
    require(choices, "aoti")
    program, interface = without_state(apply(program, choices))
    assert not [node for node in program.graph.nodes if name_of(node) is not None]
    return program, interface


def _examples(exported: ExportedProgram, interface: Interface) -> tuple[Tensor, ...]:
    """Inputs for the compiler, which looks at their sizes only."""
    flat = pytree.tree_leaves(exported.example_inputs or ())
    if flat:
        users = [flat[place] for place in interface.leaves]
    else:
        fakes = {node.name: node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")}
        users = [_zeros(fakes[name]) for name in interface.inputs]
    return (*users, *interface.state.values())


def _zeros(fake: Tensor) -> Tensor:
    sizes = [size if isinstance(size, int) else int(size.node.hint) for size in fake.shape]
    return torch.zeros(sizes, dtype=fake.dtype, device=fake.device)
