"""Going back over the passes of a program gives the graphs that were there, row by row."""

import json

import pytest
import torch

import graphwright as gw
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.rewrite import apply_decisions
from graphwright.passes.undo import Snapshot, check_undo, step_back
from graphwright.patterns.rows import rows_of
from tests.models import Mlp, captured_llama, tokens


def without_traces(rows):
    return {name: {key: value for key, value in row.items() if key != "trace"} for name, row in rows.items()}


def test_back_over_the_canonicalizers_is_the_captured_graph():
    exported = copy_exported(captured_llama().exported)
    seen = [rows_of(exported)]
    records = canonicalize(exported, on_pass=lambda record, program: seen.append(rows_of(program)))
    rows = rows_of(exported)
    assert any(record.undo["removed"] for record in records if record.undo is not None)
    for record, expected in zip(reversed(records), reversed(seen[:-1]), strict=True):
        if record.undo is not None:
            rows = step_back(rows, json.loads(json.dumps(record.undo)))
        assert without_traces(rows) == without_traces(expected), record.name
        assert list(rows) == list(expected), record.name


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return gw.optimize(captured_llama(), methods=[gw.Int8()], calibration=[tokens(24)], keep="smaller")


def test_back_over_a_rewrite_is_the_canonical_graph(program):
    canonical = gw.optimize(captured_llama())
    for phase in program.phases:
        *_, first, last = (record for record in program.history.passes if record.phase == phase and record.changed)
        assert [(record.name, record.changed) for record in (first, last)] == [
            ("quantize_linear", 14),
            ("stack_linears", 6),
        ]
        rows = step_back(rows_of(program.phases[phase].exported), last.undo)
        rows = step_back(rows, first.undo)
        assert without_traces(rows) == without_traces(rows_of(canonical.phases[phase].exported))


def test_the_record_goes_into_the_file_and_back(program, tmp_path):
    program.save(tmp_path / "llama.gw")
    loaded = gw.load(tmp_path / "llama.gw")
    assert [record.undo for record in loaded.history.passes] == [record.undo for record in program.history.passes]


@pytest.mark.parametrize(
    "forged",
    [3, {}, {"added": [], "removed": [["", "a"]], "changed": {}}, {"added": [1], "removed": [], "changed": {}}],
)
def test_a_forged_record_is_refused(forged):
    with pytest.raises(ValueError, match="no way back"):
        check_undo(forged)


def test_a_row_says_what_a_person_would_ask(program):
    rows = rows_of(program.phases["prefill"].exported)
    row = next(r for r in rows.values() if r["target"] == "graphwright.int8_linear.default" and "method" in r["by"])
    assert row["type"].startswith("float32[1, ")
    assert row["module"].endswith("o_proj")  # the first that reads its input alone
    assert row["by"] == {"pass": "quantize_linear", "method": "int8", "site": f"prefill/{row['module']}/linear[0]"}
    assert "File" in row["trace"]
    assert row["source"].partition(":")[0].endswith(".py")
    assert all(name in rows for name in row["inputs"])
    assert sum(row["op"] == "state" for row in rows.values()) == 4  # keys and values of two layers


def test_a_pass_that_moves_what_a_removed_row_stood_behind_loses_no_row():
    exported = torch.export.export(Mlp().eval(), (torch.randn(4, 32),)).run_decompositions({})
    before, rows = Snapshot(exported), rows_of(exported)
    undo = before.undo(exported)
    assert undo == {"added": [], "removed": [], "changed": {}}
    names = list(rows)
    forged = {"added": [names[1]], "removed": [["nowhere", "late", rows[names[1]]]], "changed": {}}
    assert list(step_back(rows, forged)) == [names[0], *names[2:], "late"]


def test_each_of_several_passes_over_sites_has_a_record():
    razor = gw.RazorAttention(window=6, ratio=8, sinks=2, induction=0.25)
    made = gw.optimize(
        captured_llama(), methods=[gw.Int8(), razor], calibration=[tokens(16)], keep="smaller", progress=False
    )
    plain = rows_of(gw.optimize(captured_llama(), progress=False).phases["decode"].exported)
    records = [r for r in made.history.passes if r.phase == "decode" and r.undo is not None]
    names = [record.name for record in records]
    assert names[-3:] == ["quantize_linear", "split_cache_heads", "stack_linears"]
    assert [record.nodes_after for record in records[:-1]] == [record.nodes_before for record in records[1:]]
    rows = rows_of(made.phases["decode"].exported)
    for record, there in zip(reversed(records[-3:]), (None, "window_cache_attention", "int8_linear"), strict=True):
        assert there is None or any(there in row["target"] for row in rows.values())
        rows = step_back(rows, record.undo)
        assert all(source in rows for row in rows.values() for source in row["inputs"])
        assert there is None or not any(there in row["target"] for row in rows.values())
    assert rows.keys() == plain.keys()


def test_passes_that_take_turns_have_one_record(program):
    exported = copy_exported(gw.optimize(captured_llama(), progress=False).phases["decode"].exported)
    kept = [d for d in program.decisions if d.phase == "decode" and d.status == "kept"]
    sparse = {"pass_name": "sparsify_activations", "options": {"n": 2, "m": 4}}
    turns = [decision.model_copy(update=sparse if number % 2 else {}) for number, decision in enumerate(kept)]
    rewriting = apply_decisions(exported, "decode", turns)
    rewriting.commit()
    assert not rewriting.failed
    (record,) = rewriting.records("decode")
    assert (record.name, record.changed) == ("quantize_linear + sparsify_activations", len(kept))
