"""PTX of the plugins of every operator: it assembles, and takes what is passed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from graphwright.errors import UnsupportedLowering
from graphwright.lowering.to_tensorrt.compile_entries import without_scratch
from tests.lowering.operator_calls import CALLS
from tests.lowering.to_tensorrt.ptx import entry_parameters, kernels_of
from tests.lowering.to_tensorrt.run_plugins import WITH_PLUGINS, lowered


def test_kernels_of_all_operators_assemble(tmp_path):
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for name in WITH_PLUGINS:
        made = lowered(CALLS[name], tmp_path, (89,))
        for kernel in kernels_of({"plugins": made.manifest.values()}):
            file = tmp_path / kernel["file"]
            command = [assembler, "--gpu-name=sm_89", file, "-o", tmp_path / "made"]
            subprocess.run(command, check=True, capture_output=True)
            assert len(entry_parameters(file.read_text(), kernel["entry"])) == kernel["parameters"]


def test_scratch_memory_is_refused():
    ptx = ".entry k(\n\t.param .u64 a,\n\t.param .u64 s,\n\t.param .u64 p\n)\n{ ld.param.u64 %rd1, [a]; }"
    assert without_scratch(ptx, "k") == ".entry k(\n\t.param .u64 a\n)\n{ ld.param.u64 %rd1, [a]; }"
    with pytest.raises(UnsupportedLowering, match="needs scratch memory, which TensorRT does not pass"):
        without_scratch(ptx.replace("[a]", "[s]"), "k")
