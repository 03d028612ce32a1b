"""Every name of torch that is not public, in one module: where a new torch release breaks graphwright, it breaks here.

Tested with torch 2.13; written for 2.11 to 2.13.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sympy
from torch._dispatch.python import enable_python_dispatcher
from torch._export.verifier import TrainingIRVerifier, Verifier
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import CallMethodKey, ConvertIntKey, DivideByKey, ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy import functions as sympy_functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges
from torch.utils._traceback import CapturedTraceback

__all__ = [
    "CallMethodKey",
    "ConvertIntKey",
    "DivideByKey",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "ShapeEnv",
    "TorchDispatchMode",
    "TrainingIRVerifier",
    "ValueRanges",
    "Verifier",
    "compile_package",
    "define_symbol",
    "enable_python_dispatcher",
    "int_oo",
    "load_package",
    "new_fake_mode",
    "pytree",
    "symbol_facts",
    "sympy_functions",
]


def new_fake_mode() -> FakeTensorMode:
    """A mode with an empty shape environment, with the settings that ``torch.export.load`` uses for a loaded graph."""
    env = ShapeEnv(assume_static_by_default=True)
    return FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True, shape_env=env)


def symbol_facts(env: ShapeEnv, symbol: sympy.Symbol) -> tuple[sympy.Basic | None, ValueRanges[Any] | None, bool]:
    """What an environment knows of a symbol: its value in the example, its range, and whether it is a size."""
    return env.backed_var_to_val.get(symbol), env.var_to_range.get(symbol), symbol in env.size_like


def define_symbol(
    env: ShapeEnv, symbol: sympy.Symbol, *, hint: sympy.Basic | None, interval: ValueRanges[Any] | None, size_like: bool
) -> None:
    """Make a symbol known to an environment, the inverse of ``symbol_facts``; no hint means an unbacked symbol."""
    env.var_to_range[symbol] = ValueRanges.unknown() if interval is None else interval
    if hint is not None:
        env.backed_var_to_val[symbol] = hint  # type: ignore[assignment]
        return
    # Errors about unbacked symbols quote where they were made; new ones must not take a name that is in use.
    env.var_to_stack[symbol] = CapturedTraceback.extract(skip=1)
    if size_like:
        env.size_like.add(symbol)
    if symbol.name.startswith("zuf"):
        env.unbacked_symfloat_counter = max(env.unbacked_symfloat_counter, int(symbol.name[3:]) + 1)
    elif symbol.name.startswith("u"):
        env.unbacked_symint_counter = max(env.unbacked_symint_counter, int(symbol.name[1:]) + 1)


def compile_package(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Compile a program by AOTInductor into a package; inductor is imported here, since that takes seconds."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata})


def load_package(path: Path) -> Any:
    """Open a package that `compile_package` wrote."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))
