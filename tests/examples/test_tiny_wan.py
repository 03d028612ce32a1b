"""The example prints quality and time of each method against dense, and replays a profile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_wan.py"
SIZE = ["--frames", "4", "--size", "32", "--steps", "4", "--keep", "smaller", "--dense", "0.25"]


def rows(*arguments):
    """Name -> cells of the printed table."""
    command = [sys.executable, str(EXAMPLE), *SIZE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in re.split("[│┃|]", line)[1:-1]] for line in done.stdout.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) > 5 and row[0]}


@pytest.mark.parametrize("method", ["timeripple", "astraea"])
def test_a_method_is_compared_and_replayed(method, tmp_path):
    profile = tmp_path / "profile.json"
    found = rows("--method", method, "--save-profile", str(profile))
    assert set(found) == {"dense", method}
    assert re.fullmatch(r"\d+\.\d+x", found[method][1])
    saved, psnr = found[method][-4], found[method][-3]
    assert 0 < float(saved) < 1
    assert 10 < float(psnr) < 90
    replayed = rows("--profile", str(profile))
    assert replayed[profile.name][-1] == found[method][-1]  # the checksum of the video
