"""A profile and a program file, used where nothing of the process that made them is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import graphwright as gw


def assert_replays(made: gw.Program, expected: Tensor, module: str, folder: Path) -> None:
    """Assert that a program of the tiny Llama replays from its profile, is saved and loaded, bit for bit.

    Args:
        made: The program.
        expected: What `logits` gave of it.
        module: The test's own, which has that function `logits` of a program.
        folder: Where files may be written.
    """
    profile, values, file = (str(folder / name) for name in ("profile.json", "expected.pt", "program.gw"))
    made.profile.save(profile)
    torch.save(expected, values)
    code = f"""if True:
        import torch, graphwright as gw
        from {module} import logits
        from tests.models import captured_llama
        expected = torch.load({values!r})
        made = gw.optimize(captured_llama(), profile={profile!r}, progress=False)
        assert torch.equal(logits(made), expected), "replayed"
        made.save({file!r})
        assert torch.equal(logits(gw.load({file!r})), expected), "loaded"
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
