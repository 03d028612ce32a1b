"""Operators of sparse attention as standard operators, in ONNX Runtime."""

from __future__ import annotations

import pytest

from tests.lowering.operator_calls import ATTENTION
from tests.lowering.to_onnx.run_model import assert_standard


@pytest.mark.parametrize("name", ATTENTION)
def test_standard_operators_compute_the_same(name):
    assert_standard(ATTENTION[name])
