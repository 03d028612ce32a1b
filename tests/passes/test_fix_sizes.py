"""Fixed sizes: no symbol is left, the numbers are those of the dynamic program, module paths stay."""

import pytest
import torch
from torch.export import ExportedProgram

from graphwright.errors import InvalidArgument
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.dialects import run_functional
from graphwright.passes.fix_sizes import FixSizes
from graphwright.passes.manager import PassManager
from graphwright.patterns.graph import GraphView
from graphwright.patterns.nodes import free_symbols
from tests.graph_text import operators
from tests.models import CACHE, captured_llama, tokens

DECODE = {"input_ids": {1: 1}, "cache_position": {0: 1}}


@pytest.fixture(scope="module")
def dynamic() -> ExportedProgram:
    exported = copy_exported(captured_llama().exported)
    canonicalize(exported)
    return exported


@pytest.mark.parametrize("count", [1, 5])
def test_no_symbol_is_left_and_the_numbers_are_the_same(dynamic, count) -> None:
    fixed = copy_exported(dynamic)
    sizes = {"input_ids": {1: count}, "cache_position": {0: count}}
    (record,) = PassManager([FixSizes(sizes=sizes)]).run(fixed, "fixed")
    assert record.changed > 0
    assert not any(free_symbols(node.meta.get("val")) for node in fixed.graph.nodes)
    assert not fixed.range_constraints
    assert "sym_size" not in operators(fixed)
    flat = [tokens(count, seed=3), torch.arange(4, 4 + count)]
    for a, b in zip(run_functional(dynamic, flat), run_functional(fixed, flat), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_module_paths_and_sources_stay(dynamic) -> None:
    fixed = copy_exported(dynamic)
    PassManager([FixSizes(sizes=DECODE)]).run(fixed)

    def places(exported: ExportedProgram) -> list[tuple[str, str]]:
        view = GraphView(exported)
        linears = [n for n in exported.graph.nodes if str(n.target) == "aten.linear.default"]
        return [(view.module_path(node), view.source(node)) for node in linears]

    assert places(fixed) == places(dynamic)
    assert all(path for path, _ in places(fixed))


def test_example_inputs_are_cut_to_the_sizes(dynamic) -> None:
    fixed = copy_exported(dynamic)
    PassManager([FixSizes(sizes=DECODE)]).run(fixed)
    args, _ = fixed.example_inputs
    assert [tuple(value.shape) for value in args] == [(1, 1), (1,)]
    longer = dynamic.example_inputs[0]
    assert longer[0].shape[1] > 1, "the dynamic program keeps its own"


def test_the_dynamic_program_is_not_changed(dynamic) -> None:
    fixed = copy_exported(dynamic)
    PassManager([FixSizes(sizes=DECODE)]).run(fixed)
    assert any(free_symbols(node.meta.get("val")) for node in dynamic.graph.nodes)
    dynamic.validate()
    assert dynamic.range_constraints


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tokens": {1: 1}}, "no input is called 'tokens'; the inputs are input_ids, cache_position"),
        ({"input_ids": {0: 2}}, "input_ids has length 1 in dimension 0, not 2"),
    ],
)
def test_wrong_sizes_name_the_input(dynamic, sizes, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        PassManager([FixSizes(sizes=sizes)]).run(copy_exported(dynamic))


def test_the_length_of_the_cache_is_no_symbol(dynamic) -> None:
    caches = [
        n.meta["val"].shape[2] for n in dynamic.graph.find_nodes(op="placeholder") if GraphView(dynamic).is_state(n)
    ]
    assert caches == [CACHE] * 4
