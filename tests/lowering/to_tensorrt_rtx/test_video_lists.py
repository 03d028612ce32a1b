"""Engines of what makes lists and orders of video tokens."""

from __future__ import annotations

import pytest

from tests.lowering.operator_calls import VIDEO
from tests.lowering.to_tensorrt_rtx.build_call import assert_builds

CALLS = {name: VIDEO[name] for name in VIDEO if not name.endswith(("raster", "frame_last", "checkerboard"))}


@pytest.mark.parametrize("name", CALLS)
def test_an_engine_is_built(name, tmp_path):
    assert_builds(CALLS[name], tmp_path)
