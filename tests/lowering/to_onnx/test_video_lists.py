"""Operators of video lists as standard operators, in ONNX Runtime."""

from __future__ import annotations

import pytest

from tests.lowering.operator_calls import VIDEO
from tests.lowering.to_onnx.run_model import assert_standard


@pytest.mark.parametrize("name", VIDEO)
def test_standard_operators_compute_the_same(name):
    assert_standard(VIDEO[name])
