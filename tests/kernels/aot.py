"""Compile Triton kernels ahead of time for NVIDIA devices that are not there, and read what came out.

    made = compile_kernels([Request("graphwright.kernels.int8_linear:_gemm_kernel", signature, constants, sm=90)])[0]
    assert made.spills == 0 and "wgmma" in made.ptx

One process either interprets or compiles (Triton binds its library functions once, at import), so compiling happens
in a process of its own, in which TRITON_INTERPRET is unset: this file, run with the requests as JSON on its standard
input.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Most bytes of shared memory that a block may take (CUDA programming guide, table of compute capabilities)."""

MAX_REGISTERS = 255
"""Most 32-bit registers a thread on every architecture from sm_50 on (same table)."""


@dataclass(frozen=True)
class Request:
    """A kernel by ``module:name``, the Triton types of its arguments, its constexpr values, and the launch options.

    Pointers are taken as 16-byte aligned, which torch's allocator gives, and the sizes named in ``aligned`` as
    multiples of 16; Triton specialises a launch in the same way.
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, int | bool | float]
    sm: int
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    max_registers: int | None = None


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel: registers a thread, bytes spilled, bytes of shared memory a block, and the PTX."""

    registers: int
    spills: int
    shared: int
    ptx: str = field(repr=False)

    def fits(self, sm: int) -> bool:
        """Whether the kernel can be launched on ``sm``, and spills nothing."""
        return self.registers <= MAX_REGISTERS and self.spills == 0 and self.shared <= SHARED_MEMORY[sm]


def compile_kernels(requests: list[Request]) -> list[Compiled]:
    """Compile every request in one fresh process (about 2 s, and 0.5 to 2 s a kernel)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    message = json.dumps([asdict(request) for request in requests])
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=message, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Compiled(**made) for made in json.loads(done.stdout)]


def _compile(request: Request) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = request.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {argument: request.signature.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = [
        (position,)
        for position, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in request.aligned
    ]
    made = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs=request.constants,
            attrs={position: [["tt.divisibility", 16]] for position in aligned},
        ),
        target=GPUTarget("cuda", request.sm, 32),
        options={
            "num_warps": request.num_warps,
            "num_stages": request.num_stages,
            **({} if request.max_registers is None else {"maxnreg": request.max_registers}),
        },
    )
    return Compiled(*_assemble(made.asm["ptx"]), made.metadata.shared, made.asm["ptx"])


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes, from ptxas itself: the compiled kernel's own count needs a device."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target[1]}", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill", said)
    assert registers is not None, said
    assert spills, said
    return int(registers[1]), sum(map(int, spills))


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(Request(**request))) for request in json.load(sys.stdin)]))
