"""Files that appear whole or not at all: written beside their place, and moved there when they are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import InvalidFile


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what is there becomes `path` when the block ends without an exception.

    Raises:
        InvalidFile: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_files(path: Path) -> Iterator[Path]:
    """A new folder beside `path`; its files are moved beside `path` when the block ends without an exception.

    Args:
        path: The file that was asked for. It is moved last: while it is the old one, nothing has changed for who opens
            it.

    Raises:
        InvalidFile: There is no such folder, or it cannot be written.
    """
    check_writable(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InvalidFile(f"{path}: {error.strerror or error}") from error
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    except InvalidFile:
        raise
    except OSError as error:
        raise InvalidFile(f"{path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(*paths: Path | None) -> None:
    """Refuse paths that cannot be written before the work, not after; None is left out.

    Raises:
        InvalidFile: Says what is wrong with the first.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise InvalidFile(f"{path}: is a directory")
        if not path.parent.is_dir():
            raise InvalidFile(f"{path}: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise InvalidFile(f"{path}: the folder {path.parent} cannot be written")
