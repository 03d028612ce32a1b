"""The slow pool on a file: what is stored comes back, what fails is an error, nothing is left behind."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from graphwright.errors import InvalidArgument, OffloadError
from graphwright.kernels.page_tables import Plan
from graphwright.kernels.slow_pool import FilePool, TensorPool, open_pools, pool_of
from tests.full_disk import files_of_at_most
from tests.kernels.paged_decoding import Decoding, text

SHAPE = (2, 40, 3, 2, 4, 8)


def pools(**options) -> list[FilePool]:
    return open_pools([SHAPE, (2, 40, 1, 2, 4, 16)], [torch.float32, torch.float16], **options)


def decode(decoding: Decoding, low: int, high: int) -> torch.Tensor:
    return torch.cat([decoding.step(i) for i in range(low, high)], 2)


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("buffers", [1, 2])
def test_pages_come_back_as_they_were_written(buffers):
    for pool in pools(buffers=buffers):
        pool.reserve(9)
        batch, _, heads, _, page, dim = pool.slow.shape
        content = torch.randn(batch, heads, 5, 2, page, dim).to(pool.slow.dtype)
        pool.write(3, content)
        assert torch.equal(pool.slow[:, 3:8].transpose(1, 2), content), "the mapping sees what calls write"
        assert torch.equal(pool.read(8)[:, 3:], content.transpose(1, 2))
        assert not pool.read(3).any()
        fast = torch.zeros(batch, 6, 2, page, heads, dim, dtype=pool.slow.dtype)
        plan = Plan(*(np.array(column) for column in ([0, 0, 1], [0, heads - 1, 0], [4, 1, 5], [3, 7, 5])))
        pool.load(fast, plan)
        assert torch.equal(fast[0, 4, :, :, 0], content[0, 0, 0])
        assert torch.equal(fast[0, 1, :, :, heads - 1], content[0, heads - 1, 4])
        assert torch.equal(fast[1, 5, :, :, 0], content[1, 0, 2])
        in_memory = torch.zeros_like(fast)
        TensorPool(pool.slow).load(in_memory, plan)
        assert torch.equal(in_memory, fast)


def test_a_pool_is_found_by_its_tensor():
    one, other = pools()
    assert pool_of(one.slow) is one
    assert pool_of(other.slow) is other
    assert isinstance(pool_of(torch.zeros(SHAPE)), TensorPool)


def test_nothing_is_left_behind(tmp_path):
    gc.collect()
    before = handles()
    made = pools(folder=tmp_path)
    made[0].reserve(4)
    assert list(tmp_path.iterdir()) == [], "the file has no name, so nothing can be left of it"
    assert handles() > before
    slow = made[0].slow
    del made
    gc.collect()
    assert not slow.any(), "the mapping lives as long as a tensor of it"
    del slow
    gc.collect()
    assert handles() == before


def test_work_in_the_background_is_waited_for_and_raises_there():
    pool = pools()[0]
    done = []
    pool.submit(lambda: done.append(1))
    assert pool.wait() > 0
    assert done == [1]
    assert pool.wait() == 0

    def fail() -> None:
        raise OffloadError("broken")

    pool.submit(fail)
    with pytest.raises(OffloadError, match="broken"):
        pool.wait()
    assert pool.wait() == 0


def test_a_write_that_fails_changes_nothing_at_hand():
    given = text(batch=1, length=2048, dim=16)
    decoding = Decoding(given, "in_place", file=True)
    room = 64 * 2 * 2 * 8 * 16 * 4  # 64 pages
    with files_of_at_most(room):
        decoding.several(0, 500)
        decoding.pools[0].wait()
        state = {name: tensor.clone() for name, tensor in decoding.state.items() if name != "slow"}
        with pytest.raises(OffloadError, match="fails: File too large"):
            decoding.append(500, 600)
    for name, tensor in state.items():
        assert torch.equal(tensor, decoding.state[name]), name
    torch.testing.assert_close(decode(decoding, 500, 600), given.oracle()[:, :, 500:600], rtol=0, atol=6e-6)


FULL = """
import torch
from graphwright.errors import OffloadError
from tests.kernels.paged_decoding import Decoding, text

decoding = Decoding(text(batch=1, length=2048), "in_place", file=True)  # 512 KB, on 256 KB
decoding.several(0, 300)
decoding.pools[0].wait()
state = {name: tensor.clone() for name, tensor in decoding.state.items() if name != "slow"}
try:
    decoding.append(300, 1500)
except OffloadError as error:
    print(error)
assert all(torch.equal(tensor, decoding.state[name]) for name, tensor in state.items())
decoding.step(300)
"""


def test_a_full_disk_is_refused_before_anything_changes(tmp_path):
    """On a real one: a small file system of this process' own."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    script = f"mount -t tmpfs -o size=256k none {tmp_path} && "
    if shutil.which("unshare") is None or subprocess.run([*mount, script + "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system")
    command = f"{script} TMPDIR={tmp_path} {sys.executable} -c '{FULL}'"
    done = subprocess.run([*mount, command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no room for" in done.stdout
    assert "What was generated so far is kept" in done.stdout


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OffloadError, match=r"no slow pool of .* bytes in .*missing"):
        pools(folder=tmp_path / "missing")


def test_a_file_that_ends_early_is_an_error_and_what_is_at_hand_stays():
    given = text(batch=1)
    decoding = Decoding(given, "in_place", file=True)
    decoding.several(0, 100)
    decoding.step(100)
    file = decoding.pools[0].file
    size = os.fstat(file.handle).st_size
    kept = decoding.pools[0].read(12)
    decoding.pools[0].wait()
    os.ftruncate(file.handle, 0)
    with pytest.raises(OffloadError, match="ends at byte"):
        decode(decoding, 101, 128)
    os.ftruncate(file.handle, size)
    decoding.pools[0].write(0, kept.transpose(1, 2))
    given.tau = 2.0
    wanted = given.oracle()
    again = decode(decoding, 101, 128)
    torch.testing.assert_close(again, wanted[:, :, 101:], rtol=0, atol=6e-6)


def test_a_fork_is_refused():
    pool = pools()[0]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover (another process)
        try:
            pool.reserve(2)
        except InvalidArgument as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert "belongs to process" in os.read(read, 1000).decode()
    os.close(read)


def test_more_pages_than_there_are_are_refused():
    with pytest.raises(InvalidArgument, match="the slow pool holds 40 pages, got page 40"):
        pools()[0].reserve(41)
