"""What a plugin is: which kernel it launches, what it passes, and how large its outputs and its grid are.

Sizes are expressions over the inputs' shapes, as data, since TensorRT evaluates them when the engine runs:

    7,  ["numel", input],  ["size", input, dimension],  ["*", a, b],  ["//", a, b],  ["cdiv", a, b]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Expression = int | tuple[Any, ...]

NAMESPACE = "graphwright"
"""Of the plugins in TensorRT's registry."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: its type in TensorRT, the type that Triton gives its elements, and an output's shape."""

    kind: str
    element: str
    shape: tuple[Expression, ...] = ()


@dataclass(frozen=True)
class Integer:
    """An int32 argument; `aligned`: it is a multiple of 16, which lets Triton load several elements at once."""

    name: str
    value: Expression
    aligned: bool = False


@dataclass(frozen=True)
class Tactic:
    """One way to launch the kernel; TensorRT times all of a plugin's and takes the fastest.

    Attributes:
        constants: Compiled in, by the entry's parameter.
        grid: Programs along x, y and z.
        num_warps: Of 32 threads.
        num_stages: Tiles that are loaded ahead.
    """

    constants: tuple[tuple[str, int | float | bool], ...]
    grid: tuple[Expression, ...]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Plugin:
    """A plugin, told apart by all of this.

    Attributes:
        entry: The kernel, in `entries.py`.
        inputs: In the kernel's order.
        integers: What is passed after the inputs.
        outputs: What is passed last.
        tactics: At least one.
    """

    entry: str
    inputs: tuple[Tensor, ...]
    integers: tuple[Integer, ...]
    outputs: tuple[Tensor, ...]
    tactics: tuple[Tactic, ...]


@dataclass
class Plugins:
    """The plugins of a program by name; what is equal in all its phases is one."""

    by_name: dict[str, Plugin] = field(default_factory=dict)

    def name(self, plugin: Plugin) -> str:
        """The name of a plugin, a new one if there is none that is equal."""
        for name, known in self.by_name.items():
            if known == plugin:
                return name
        name = f"{plugin.entry}_{sum(known.entry == plugin.entry for known in self.by_name.values())}"
        self.by_name[name] = plugin
        return name
