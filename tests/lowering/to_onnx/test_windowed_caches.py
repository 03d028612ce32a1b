"""Operators of windowed caches as standard operators, in ONNX Runtime."""

from __future__ import annotations

import pytest

from tests.lowering.operator_calls import WINDOW_CACHE
from tests.lowering.to_onnx.run_model import assert_standard


@pytest.mark.parametrize("name", WINDOW_CACHE)
def test_standard_operators_compute_the_same(name):
    assert_standard(WINDOW_CACHE[name])
