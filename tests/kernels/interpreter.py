"""Run functions that launch Triton kernels in Triton's interpreter, on the CPU.

    y, = interpret([Call("graphwright.kernels.int8_linear:launch", (x, weight, scale))])

One process either interprets or compiles (Triton binds its library functions once, at import), so interpreting happens
in a process of its own with TRITON_INTERPRET=1: this file, with the calls and their results as files of tensors. The
interpreter computes bfloat16 wrongly (it adds the bits as integers): use float32 and float16. It takes about a
millisecond a program: keep grids under some hundreds.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """A function by ``module:name``, and arguments that ``torch.save`` writes and a safe load reads."""

    function: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (never written to)


def interpret(calls: list[Call]) -> list[Any]:
    """The results of all calls, from one fresh process whose Triton interprets (about 3 s)."""
    return call_with(calls, TRITON_INTERPRET="1")


def interpret_groups(*groups: list[Call]) -> list[list[Any]]:
    """The results of several lists of calls, each a list, from one process."""
    results = iter(interpret([call for group in groups for call in group]))
    return [[next(results) for _ in group] for group in groups]


def call_with(calls: list[Call], **environment: str) -> list[Any]:
    """The results of all calls, from one fresh process with these environment variables set."""
    with tempfile.TemporaryDirectory() as folder:
        sent, answered = Path(folder, "calls.pt"), Path(folder, "results.pt")
        torch.save([tuple(call) for call in calls], sent)
        command = [sys.executable, __file__, str(sent), str(answered)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return torch.load(answered, weights_only=True)


def _run(sent: str, answered: str) -> None:
    results = []
    for function, args, kwargs in torch.load(sent, weights_only=True):
        module, name = function.split(":")
        results.append(getattr(importlib.import_module(module), name)(*args, **kwargs))
    torch.save(results, answered)


if __name__ == "__main__":
    # Functions of other tests are found, behind everything that is installed.
    sys.path.append(str(Path(__file__).parents[2]))
    _run(*sys.argv[1:])
