"""A program's calls, checks, files and explanations."""

import json
import os
import subprocess
import sys

import networkx as nx
import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidFile, InvalidType
from tests.models import CACHE, Mlp, captured_llama, tokens


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return gw.optimize(captured_llama(), methods=[gw.Int8(roles=("gate", "up"))], keep="smaller")


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((tokens(4),), {}, InvalidType, "missing input 'cache_position'"),
        ((tokens(4), torch.arange(4), 1), {}, InvalidType, "takes 2 inputs"),
        ((tokens(4),), {"position": 1}, InvalidType, "there is no input 'position'"),
        ((tokens(4),), {"input_ids": 1}, InvalidType, "two values for 'input_ids'"),
        ((tokens(4).float(), torch.arange(4)), {}, InvalidType, r"input_ids must be int64\[1, s\d+\], got float32"),
        ((tokens(4)[0], torch.arange(4)), {}, InvalidType, "input_ids must be"),
        ((tokens(4).repeat(2, 1), torch.arange(4)), {}, InvalidType, "dimension 0 is fixed"),
        ((tokens(4), torch.arange(5)), {}, InvalidType, "another input says 4"),
        ((tokens(4), torch.tensor([0, 2, 1, 3])), {}, InvalidArgument, "must be consecutive"),
        ((tokens(4), torch.arange(CACHE - 2, CACHE + 2)), {}, InvalidArgument, "do not fit the captured cache of 32"),
        ((tokens(1), torch.tensor([CACHE])), {}, InvalidArgument, "do not fit the captured cache"),
        (("text", torch.arange(4)), {}, InvalidType, "input_ids must be a tensor"),
    ],
)
def test_wrong_arguments_name_the_input(program, args, kwargs, error, message) -> None:
    with pytest.raises(error, match=message):
        program(*args, **kwargs)


def test_generation_beyond_the_cache_is_refused(program) -> None:
    with pytest.raises(InvalidArgument, match="8 \\+ 30 tokens do not fit the captured cache of 32"):
        program.generate(tokens(8), 30)
    assert program.generate(tokens(8), CACHE - 8 + 1).shape[1] == CACHE + 1


def test_generate_needs_a_language_model() -> None:
    with pytest.raises(InvalidArgument, match="generate needs a program of capture_causal_lm"):
        gw.optimize(Mlp().eval(), (torch.randn(2, 32),)).generate(tokens(4), 4)


def test_reset_empties_the_cache(program) -> None:
    program(tokens(6), torch.arange(6))
    assert any(tensor.any() for name, tensor in program._state().items())
    program.reset()
    assert not any(tensor.any() for name, tensor in program._state().items())


def test_a_missing_device_is_named(program) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(InvalidArgument, match="device cuda"):
        program.to("cuda")
    with pytest.raises(InvalidArgument, match="device tpu9"):
        program.to("tpu9")


def test_save_and_load_are_bit_equal_in_another_process(program, tmp_path) -> None:
    path = tmp_path / "program.gw"
    program.save(path)
    ids = tokens(10)
    program.reset()
    expected = [program(ids, torch.arange(10)), program(ids[:, :1], torch.tensor([10]))]
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import torch, graphwright as gw
program = gw.load({str(path)!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
ids = torch.tensor({ids.tolist()})
got = [program(ids, torch.arange(10)), program(ids[:, :1], torch.tensor([10]))]
assert all(torch.equal(a, b) for a, b in zip(expected, got)), "not bit-equal"
assert len(program.decisions) == {len(program.decisions)}
program.report()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    # At this size the graphs outweigh the weights; the benchmark holds the ratio on the real model.
    assert path.stat().st_size < program.weight_bytes() + 700_000


def test_what_is_loaded_reports_and_explains_as_before(program, tmp_path) -> None:
    program.save(tmp_path / "p.gw")
    loaded = gw.load(tmp_path / "p.gw")
    assert str(loaded.report()) == str(program.report())
    site = program.decisions[0].site
    assert loaded.explain(site) == program.explain(site)
    assert loaded.diff("decode") == program.diff("decode")
    loaded.profile.check(program.profile.fingerprint)
    loaded.save(tmp_path / "again.gw")


def test_a_full_cache_is_not_saved(program, tmp_path) -> None:
    program.reset()
    program.save(tmp_path / "empty.gw")
    program(tokens(20), torch.arange(20))
    program.save(tmp_path / "full.gw")
    assert (tmp_path / "full.gw").stat().st_size == (tmp_path / "empty.gw").stat().st_size
    assert not any(tensor.any() for tensor in gw.load(tmp_path / "full.gw")._state().values())


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"], ids=["empty", "foreign", "truncated"])
def test_foreign_files_are_refused_by_name(tmp_path, content) -> None:
    path = tmp_path / "foreign.gw"
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match=r"foreign\.gw"):
        gw.load(path)


def test_a_missing_file_and_a_truncated_one(program, tmp_path) -> None:
    with pytest.raises(InvalidFile, match=r"missing\.gw"):
        gw.load(tmp_path / "missing.gw")
    program.save(tmp_path / "p.gw")
    whole = (tmp_path / "p.gw").read_bytes()
    (tmp_path / "cut.gw").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidFile, match=r"cut\.gw"):
        gw.load(tmp_path / "cut.gw")


def test_an_output_that_cannot_be_written_leaves_nothing(program, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidFile, match="file"):
        program.save(tmp_path / "file" / "p.gw")
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_save_keeps_the_old_file(program, tmp_path, monkeypatch) -> None:
    path = tmp_path / "p.gw"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        program.save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["p.gw"]


def test_report_has_every_decision_and_json(program) -> None:
    data = json.loads(json.dumps(program.report().to_json()))
    assert len(data["decisions"]) == len(program.decisions)
    assert data["phases"]["prefill"]["sites"]["attention"] == 2
    text = str(program.report())
    for expected in ("prefill", "quantize_linear", "role down is not asked for", "assume_empty_cache"):
        assert expected in text


def test_explain_shows_the_chain_and_suggests_near_ids(program) -> None:
    kept = next(d for d in program.decisions if d.status == "kept")
    text = program.explain(kept.site)
    for expected in (kept.site, "status: kept", "error", "graphwright.int8_linear", "features: 64 -> 96"):
        assert expected in text
    with pytest.raises(InvalidArgument, match=r"near it: .*gate_proj"):
        program.explain(kept.site.replace("linear", "lineer"))


def test_diff_shows_what_the_rewrites_changed(program) -> None:
    text = program.diff("decode")
    removed = [line for line in text.splitlines() if line.startswith("-%")]
    added = [line for line in text.splitlines() if line.startswith("+%")]
    assert sum("aten.linear" in line for line in removed) == 4
    assert sum("graphwright.int8_linear" in line for line in added) == 2  # gate and up of two layers run as one
    with pytest.raises(InvalidArgument, match="no phase 'encode'; there are decode"):
        program.diff("encode")


def test_networkx_graph_is_the_program_s_dataflow(program) -> None:
    graph = program.to_networkx("decode")
    assert nx.is_directed_acyclic_graph(graph)
    made = {name: data["made_by_pass"] for name, data in graph.nodes(data=True) if "made_by_pass" in data}
    targets = [(by, graph.nodes[name]["target"]) for name, by in made.items()]
    assert targets.count(("stack_linears", "graphwright.int8_linear.default")) == 2
    assert {target for by, target in targets if by == "quantize_linear"} <= {"aten.slice.Tensor", "aten.mul.Tensor"}
    "".join(nx.generate_graphml(graph))
