"""C functions that are compiled when needed: found again, left out where they cannot be made, split by rows."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest
import torch

from graphwright.kernels import native as module
from graphwright.kernels.native import native, run_split

SOURCE = "int answer(void) { return 42; }"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.cache_clear()
    yield tmp_path / "graphwright"
    native.cache_clear()


needs_compiler = pytest.mark.skipif(module._compiler() is None, reason="needs a C compiler")


@needs_compiler
def test_it_is_compiled_once_and_found_again(own_cache, monkeypatch):
    library = native(SOURCE)
    assert isinstance(library, ctypes.CDLL)
    assert library.answer() == 42
    (made,) = own_cache.iterdir()
    native.cache_clear()
    monkeypatch.setattr(module, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert native(SOURCE) is not None
    assert [path.name for path in own_cache.iterdir()] == [made.name]


@needs_compiler
def test_other_sources_are_other_files(own_cache):
    assert native(SOURCE) is not None
    assert native(SOURCE + "\n") is not None
    assert len(list(own_cache.iterdir())) == 2


def test_without_a_compiler_there_is_none(own_cache, monkeypatch):
    for name in ("", "no-such-compiler"):
        monkeypatch.setenv("CC", name)
        native.cache_clear()
        assert native(SOURCE) is None
    assert not own_cache.exists()


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing(own_cache):
    assert native("int answer(void) { return }") is None
    assert list(own_cache.iterdir()) == []


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_others_may_write_to_is_not_loaded_from(own_cache):
    own_cache.mkdir()
    own_cache.chmod(0o777)
    assert native(SOURCE) is None
    shutil.rmtree(own_cache)
    native.cache_clear()
    assert native(SOURCE) is not None
    assert own_cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_all_rows_are_run_once(threads, rows):
    before, seen = torch.get_num_threads(), torch.zeros(rows)

    def run(start: int, stop: int) -> None:
        seen[start:stop] += 1

    try:
        torch.set_num_threads(threads)
        run_split(rows, 10**6, run)
    finally:
        torch.set_num_threads(before)
    assert seen.tolist() == [1.0] * rows
