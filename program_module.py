"""A program as a module, to stand where the model stood: in a diffusers pipeline, in code that calls the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import InvalidType

if TYPE_CHECKING:
    from .program import Program


class ProgramModule(nn.Module):
    """A program as a module with the model's call; see `Program.as_module`."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.config = _Config(program.facts.get("config") or {})

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating-point weights."""
        tensors = (t for p in self.program.phases.values() for t in p.exported.state_dict.values())
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.program.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call; a denoiser gives its sample in a tuple, as diffusers does with `return_dict=False`."""
        wraps = self.program.kind == "denoiser"
        if wraps and kwargs.pop("return_dict", False):
            raise InvalidType("the program was captured with return_dict=False")
        known = {k: v for k, v in kwargs.items() if k in self.program.inputs or v is not None}
        result = self.run(*args, **known)
        return (result,) if wraps else result

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program."""
        return self.program(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str, **options: Any) -> Iterator[None]:
        """What diffusers' pipelines enter around each guidance branch: state between steps is the branch's own."""
        with self.program.branch(name):
            yield


class _Config(dict[str, Any]):
    """A model's configuration, by key and by attribute as diffusers and transformers read it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None
