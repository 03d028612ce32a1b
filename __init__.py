"""graphwright: a compiler-style graph-rewriting pass over exported PyTorch models.

    import graphwright as gw

    program = gw.optimize(model, args, methods=[gw.Int8()], calibration=batches)
    y = program(*args)            # called like the model
    print(program.report())       # what was found, tried, kept, refused, rolled back, and why

Names are imported when they are first used, so `import graphwright` costs next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capture import Captured, capture
    from .capture_causal_lm import capture_causal_lm
    from .capture_denoiser import capture_denoiser
    from .errors import GraphwrightError
    from .inspection.bisection import bisect
    from .optimize import inspect, optimize, search
    from .passes.decision import Decision
    from .phases import Phase
    from .profiles.amber import AmberPruner
    from .profiles.astraea import Astraea
    from .profiles.budget import Budget
    from .profiles.compact_attention import CompactAttention
    from .profiles.dartquant import DartQuant
    from .profiles.freekv import FreeKV
    from .profiles.int8 import Int8
    from .profiles.kvtuner import KVTuner
    from .profiles.losa import LoSA
    from .profiles.method import Method, methods
    from .profiles.outstanding import OutstandingSparse
    from .profiles.presets import preset
    from .profiles.profile import Profile
    from .profiles.rainfusion import RainFusion
    from .profiles.razor import RazorAttention
    from .profiles.timeripple import TimeRipple
    from .program import Program
    from .program_file import load

__version__ = "0.1.0"

_HOME = {
    "AmberPruner": "profiles.amber",
    "Astraea": "profiles.astraea",
    "Budget": "profiles.budget",
    "Captured": "capture",
    "CompactAttention": "profiles.compact_attention",
    "DartQuant": "profiles.dartquant",
    "Decision": "passes.decision",
    "FreeKV": "profiles.freekv",
    "GraphwrightError": "errors",
    "Int8": "profiles.int8",
    "KVTuner": "profiles.kvtuner",
    "LoSA": "profiles.losa",
    "Method": "profiles.method",
    "OutstandingSparse": "profiles.outstanding",
    "Phase": "phases",
    "Profile": "profiles.profile",
    "Program": "program",
    "RainFusion": "profiles.rainfusion",
    "RazorAttention": "profiles.razor",
    "TimeRipple": "profiles.timeripple",
    "bisect": "inspection.bisection",
    "capture": "capture",
    "capture_causal_lm": "capture_causal_lm",
    "capture_denoiser": "capture_denoiser",
    "inspect": "optimize",
    "load": "program_file",
    "methods": "profiles.method",
    "optimize": "optimize",
    "preset": "profiles.presets",
    "search": "optimize",
}

__all__ = [
    "AmberPruner",
    "Astraea",
    "Budget",
    "Captured",
    "CompactAttention",
    "DartQuant",
    "Decision",
    "FreeKV",
    "GraphwrightError",
    "Int8",
    "KVTuner",
    "LoSA",
    "Method",
    "OutstandingSparse",
    "Phase",
    "Profile",
    "Program",
    "RainFusion",
    "RazorAttention",
    "TimeRipple",
    "bisect",
    "capture",
    "capture_causal_lm",
    "capture_denoiser",
    "inspect",
    "load",
    "methods",
    "optimize",
    "preset",
    "search",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'graphwright' has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Keeps `gw.optimize` the function: importing the module of the same name would set it to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
