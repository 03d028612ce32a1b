"""Attention to the new tokens only, where the cache is known to hold nothing."""

import pytest
import torch
from torch.export import ExportedProgram

from graphwright.passes.assume_empty_cache import AssumeEmptyCache
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.dialects import run_functional
from graphwright.passes.manager import PassManager
from tests.graph_text import check_text, operators
from tests.models import captured_llama, tokens


@pytest.fixture(scope="module")
def canonical() -> ExportedProgram:
    exported = copy_exported(captured_llama().exported)
    canonicalize(exported)
    return exported


@pytest.fixture(scope="module")
def prefill(canonical) -> ExportedProgram:
    exported = copy_exported(canonical)
    (record,) = PassManager([AssumeEmptyCache()]).run(exported, "prefill")
    assert record.changed == 2
    assert not record.refusals
    return exported


def test_attention_reads_the_new_keys_and_the_mask_is_gone(canonical, prefill) -> None:
    check_text(
        canonical,
        """
        CHECK: %[[CACHE:index_copy[_0-9]*]]: {{.*}} = aten.index_copy.default(key_cache_0
        CHECK: scaled_dot_product_attention.default({{%[a-z_0-9]+}}, %[[CACHE]],
        """,
    )
    check_text(
        prefill,
        """
        CHECK: scaled_dot_product_attention.default({{%[a-z_0-9]+}}, {{%[a-z_0-9]+}}, {{%[a-z_0-9]+}}, None, 0.0, True
        CHECK: scaled_dot_product_attention.default({{%[a-z_0-9]+}}, {{%[a-z_0-9]+}}, {{%[a-z_0-9]+}}, None, 0.0, True
        """,
    )
    for node in prefill.graph.nodes:
        if "scaled_dot_product" in str(node.target):
            query, key = (argument.meta["val"].shape for argument in node.args[:2])
            assert query[2] == key[2], "as many keys as queries, not the cache's length"


def test_the_cache_is_still_written(canonical, prefill) -> None:
    assert operators(prefill).count("index_copy") == operators(canonical).count("index_copy") == 4
    assert len(prefill.graph_signature.buffers_to_mutate) == 4


@pytest.mark.parametrize("count", [2, 7, 20])
def test_the_numbers_are_the_same_from_position_zero(canonical, prefill, count) -> None:
    flat = [tokens(count, seed=1), torch.arange(count)]
    for a, b in zip(run_functional(canonical, flat), run_functional(prefill, flat), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_from_another_position_they_differ(canonical, prefill) -> None:
    """The condition of the phase is needed: with a cache that holds something, the short attention is wrong."""
    flat = [tokens(4), torch.arange(6, 10)]
    before, after = run_functional(canonical, flat)[-1], run_functional(prefill, flat)[-1]
    assert not torch.allclose(before, after, rtol=1e-2, atol=1e-3)


def test_another_position_input_is_refused_with_the_reason(canonical) -> None:
    exported = copy_exported(canonical)
    (record,) = PassManager([AssumeEmptyCache(start_input="input_ids")]).run(exported)
    assert record.changed == 0
    assert len(record.refusals) == 2
    assert all("not causal in the cache's positions" in str(refusal) for refusal in record.refusals)
