"""The slow memory of a program: its file's life, two programs at once, files that fail, forks, and what is saved."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument, MissingKernel, OffloadError
from tests.full_disk import files_of_at_most
from tests.models import tokens
from tests.offloaded import SMALL, captured, decoded, freekv


def made() -> gw.Program:
    """A program that no other test has."""
    return gw.optimize(captured(), methods=[gw.FreeKV(tau=0.0, **SMALL)], progress=False)


def handles(expected: int | None = None) -> int:
    """Open files of this process; it is waited for so many, since what works in the background ends a little later."""
    found = -1
    for _ in range(100):
        gc.collect()  # a lowered graph refers to itself
        found = len(os.listdir("/proc/self/fd"))
        if expected is None or found == expected:
            break
        time.sleep(0.05)
    return found


def test_two_programs_do_not_see_each_other():
    one, other = made(), made()
    expected = decoded(one)
    ids = tokens(84)
    for program in (one, other):
        program.reset()
        program(ids[:, :60] if program is one else ids[:, :60] * 0, torch.arange(60))
    steps = []
    for i in range(60, 84):
        steps.append(one(ids[:, i : i + 1], torch.tensor([i])))
        other(ids[:, :1], torch.tensor([i]))
    assert torch.equal(torch.cat(steps, 1), expected[:, 1:])


def test_a_reset_is_an_empty_cache():
    program = made()
    expected = decoded(program)
    decoded(program, 40, 70)
    assert torch.equal(decoded(program), expected)
    program.reset()
    assert program.offload_figures()["chosen"] == 0


def test_the_file_comes_with_the_first_call_and_goes_with_the_program(tmp_path: Path):
    before = handles()
    program = made()
    program.offload_to(tmp_path)
    assert (handles(), program.offloaded_bytes()) == (before, 0)
    expected = decoded(program)
    assert handles() > before
    assert program.offloaded_bytes() > 0
    assert list(tmp_path.iterdir()) == [], "it has no name, so nothing is left of it"
    assert program.state_bytes() < 2 * 2 * 2 * 128 * 16 * 4, "what is on the disk is not in memory"
    with pytest.raises(InvalidArgument, match="buffers must be 1 or 2, got 3"):
        program.offload_to(buffers=3)
    program.offload_to(buffers=2)
    assert (handles(before), program.offloaded_bytes()) == (before, 0)
    assert torch.equal(decoded(program), expected)
    del program
    assert handles(before) == before


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    program = made()
    program.offload_to(tmp_path / "missing")
    with pytest.raises(OffloadError, match=r"no slow pool of .* bytes in .*missing"):
        program.generate(tokens(8), 2)
    program.offload_to(tmp_path)
    assert program.generate(tokens(8), 2).shape == (1, 10)


def test_pages_are_not_saved(tmp_path: Path):
    program = made()
    expected = decoded(program)
    program.save(tmp_path / "used.gw")
    made().save(tmp_path / "fresh.gw")
    sizes = [(tmp_path / name).stat().st_size for name in ("used.gw", "fresh.gw")]
    # A report with counts; one page of one layer takes 1 KB, and the program has written 42.
    assert abs(sizes[0] - sizes[1]) < 1024
    loaded = gw.load(tmp_path / "used.gw")
    assert loaded.offloaded_bytes() == 0
    pools = [tensor for name, tensor in loaded._state().items() if name.endswith(".slow")]
    assert [pool.untyped_storage().nbytes() for pool in pools] == [4, 4], "nothing is in memory"
    assert torch.equal(decoded(loaded), expected)
    assert torch.equal(decoded(program), expected)


def test_a_text_that_is_longer_than_the_pool_is_refused():
    program = made()
    with pytest.raises(InvalidArgument, match="100 \\+ 60 tokens do not fit the captured cache of 128"):
        program.generate(tokens(100), 60)
    with pytest.raises(InvalidArgument, match="128"):
        program(tokens(1), torch.tensor([128]))


def test_a_full_disk_loses_nothing_that_was_generated():
    program = made()
    prompt = tokens(60)
    whole = program.generate(prompt, 40)
    record = 2 * 2 * 2 * 4 * 16 * 4  # a page of both layers
    with files_of_at_most(20 * record), pytest.raises(OffloadError, match=r"the slow pool in .* fails") as caught:
        program.generate(prompt, 40)
    text = caught.value.generated
    assert text is not None
    assert 60 < text.shape[1] < 100
    assert torch.equal(text, whole[:, : text.shape[1]])
    # With room it goes on from there, token by token and anew.
    at = text.shape[1] - 1
    token = program(text[:, -1:], torch.tensor([at]))[:, -1].argmax(-1)
    assert int(token) == int(whole[0, at + 1])
    assert program.generate(text, 100 - text.shape[1])[:, : at + 1].equal(text)


def test_a_file_that_fails_is_an_error_with_what_was_generated():
    program = made()
    prompt = tokens(60)
    whole = program.generate(prompt, 30)
    steps = 0
    run = program.run_phase

    def run_phase(phase: str, flat: list[torch.Tensor]) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 10:
            os.ftruncate(program._offload._pools[0].file.handle, 0)
        return run(phase, flat)

    program.run_phase = run_phase  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OffloadError, match=r"the slow pool in .* ends at byte") as caught:
        program.generate(prompt, 30)
    text = caught.value.generated
    assert text is not None
    assert torch.equal(text, whole[:, : text.shape[1]])
    assert text.shape[1] >= 69
    program.offload_to()
    assert torch.equal(program.generate(prompt, 30), whole)


@pytest.fixture
def one_thread():
    """A fork has none of the threads that PyTorch started, and would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_fork_gets_a_file_of_its_own_by_a_reset():
    program = made()
    expected = decoded(program)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover (another process)
        signal.alarm(60)  # what waits for threads that a fork has not would wait for ever
        try:
            program(tokens(1), torch.tensor([84]))
        except InvalidArgument as error:
            os.write(write, str(error).encode())
        os.write(write, b"|" + str(torch.equal(decoded(program), expected)).encode())
        os._exit(0)
    os.close(write)
    said = b""
    while part := os.read(read, 1000):
        said += part
    os.waitpid(child, 0)
    os.close(read)
    refused, equal = said.decode().split("|")
    assert "belongs to process" in refused
    assert "call reset()" in refused
    assert equal == "True"
    assert torch.equal(decoded(program), expected)


def test_a_gpu_is_refused_by_name():
    with pytest.raises(MissingKernel, match=r"graphwright::page_append has no kernel for device 'cuda'.* Move .* cpu"):
        freekv(tau=0.0).to("cuda")
