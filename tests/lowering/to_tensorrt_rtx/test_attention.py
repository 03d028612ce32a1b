"""Engines of sparse attention and of windowed caches."""

from __future__ import annotations

import pytest

from tests.lowering.operator_calls import ATTENTION, WINDOW_CACHE
from tests.lowering.to_tensorrt_rtx.build_call import assert_builds

CALLS = ATTENTION | {
    name: WINDOW_CACHE[name]
    for name in (
        "window_cache_append, a token",
        "window_cache_append, padded",
        "window_cache_attention, a token",
        "window_cache_attention, padded",
    )
}


@pytest.mark.parametrize("name", CALLS)
def test_an_engine_is_built(name, tmp_path):
    assert_builds(CALLS[name], tmp_path)
