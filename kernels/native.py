"""Small C functions for the CPU, compiled when they are first called, where there is a C compiler.

    library = native(SOURCE)      # a ctypes.CDLL, or None: then the caller has another way in torch operators

What torch has no operator for, a dozen of its operators do in as many passes over memory. The compiled file is kept in
the user's cache folder (`$XDG_CACHE_HOME/graphwright`, else `~/.cache/graphwright`), under a hash of all that went into
it. The environment variable `CC` names the compiler as usual; `CC=` (empty) turns this off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_SECONDS = 60
"""How long a compiler may take; it takes half a second."""


@cache
def native(source: str) -> ctypes.CDLL | None:
    """Compile C source and load it.

    Args:
        source: Functions with C linkage.

    Returns:
        The library; None where there is no compiler, it fails, or the cache folder is not the user's own.
    """
    compiler = _compiler()
    if compiler is None or os.name != "posix":
        return None
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-x", "c"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.insert(0, "-mprefer-vector-width=512")
    facts = (source, compiler, flags, platform.machine(), sorted(torch.cpu.get_capabilities().items()))
    name = f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.so"
    try:
        folder = _folder()
        if not (folder / name).exists():
            _compile([*compiler, *flags], source, folder / name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.SubprocessError):
        return None


def run_split(rows: int, work: int, run: Callable[[int, int], object]) -> None:
    """Run `run(start, stop)` over all rows, in as many threads as torch may use; foreign calls let go of the GIL.

    Args:
        rows: How many rows there are.
        work: Values that are computed in all; a thread is worth its start from some ten thousand on.
        run: Computes rows start to stop.
    """
    threads = min(torch.get_num_threads(), rows, work // 65536)
    if threads <= 1:
        run(0, rows)
        return
    edges = [rows * part // threads for part in range(threads + 1)]
    list(_pool(threads).map(run, edges[:-1], edges[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="graphwright")


def _compiler() -> list[str] | None:
    named = os.environ.get("CC")
    if named is not None:
        words = shlex.split(named)
        return words if words and shutil.which(words[0]) else None
    return next(([found] for name in ("gcc", "clang", "cc") if (found := shutil.which(name))), None)


def _folder() -> Path:
    """The cache folder; what others may write to is no place to load code from."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "graphwright"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by others")
    return folder


def _compile(command: Sequence[str], source: str, target: Path) -> None:
    """Compile into a file beside the target, which it becomes when it is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        subprocess.run(
            [*command, "-", "-o", str(made)],
            input=source,
            text=True,
            capture_output=True,
            check=True,
            timeout=_SECONDS,
        )
        os.replace(made, target)
