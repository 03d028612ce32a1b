"""What is printed about a program: the tree of modules, explanations, differences, graphs for other viewers."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import networkx as nx
import pytest
import torch
from rich.console import Console

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidFile
from graphwright.inspection.graph_export import dot_text
from graphwright.inspection.report import Inspection
from graphwright.inspection.report_diff import ProgramDiff
from graphwright.patterns.find import find_sites
from graphwright.patterns.graph import GraphView
from tests.html_report.programs import canonical, quantized
from tests.models import captured_llama


def printed(renderable, width: int = 118) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return gw.inspect(captured_llama())


def test_layers_that_are_alike_are_shown_once(inspection):
    text = printed(inspection)
    assert text.count("0 to 1 (2 alike)") == 3  # once a phase
    assert len(re.findall(r"gate_proj  linear", text)) == 3
    assert "modeling_llama.py" in text


def test_every_layer_can_be_shown():
    each = gw.inspect(captured_llama())
    each.every = True
    assert len(re.findall(r"gate_proj  linear", printed(each))) == 6


@pytest.mark.parametrize("width", [80, 118])
def test_the_tree_cuts_nothing(inspection, width):
    text = printed(inspection, width)
    assert "…" not in text
    for site in inspection.sites["prefill"].all:
        assert site.id.rsplit("/", 1)[-1] in text


def test_explain_tells_the_chain_of_a_rewritten_site():
    decision = next(d for d in quantized().decisions if d.status == "kept" and d.phase == "prefill")
    text = quantized().explain(decision.site)
    order = [
        "matched",
        "source: modeling_llama.py",
        "int8 decided",
        "status: kept",
        "guard of",
        "pass quantize_linear",
        "now in",
    ]
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert re.search(r"added int8_linear\w*; removed linear", text)


def test_explain_tells_what_a_guard_says_of_a_site_that_stands():
    refused = next(d for d in quantized().decisions if d.status == "refused")
    assert "guard of quantize_linear: holds" in quantized().explain(refused.site)


def test_explain_of_a_module_says_what_nearly_was_a_site():
    sites = quantized().sites["decode"]
    refusal = next(r for refusals in sites.refusals.values() for r in refusals if r.module_path or r.node)
    text = quantized().explain(refusal.module_path or refusal.node)
    assert "nearly" in text
    assert refusal.reason in text


def test_two_programs_beside_each_other():
    compared = ProgramDiff(canonical(), quantized())
    text = printed(compared)
    assert "graphwright.int8_linear.default" in text
    rows = compared.operators("decode")
    kept = sum(d.status == "kept" and d.phase == "decode" for d in quantized().decisions)
    assert ("graphwright.int8_linear.default", 0, 8) in rows  # two layers of qkv, o, gate and up, down
    assert len(compared.decisions()) == len(quantized().decisions)
    assert compared.graph("decode").count("\n+") >= kept
    with pytest.raises(InvalidArgument, match="first program has no phase"):
        compared.graph("encode")


def test_a_program_is_like_itself():
    same = ProgramDiff(canonical(), canonical())
    assert "The decisions are the same." in printed(same)
    assert same.graph("prefill") == ""
    assert all(same.operators(phase) == [] for phase in canonical().phases)


def test_the_graph_as_text_has_shapes_inputs_and_state():
    text = quantized().graph("prefill")
    assert re.search(r"^%input_ids: int64\[1, s\w*\] = input$", text, re.MULTILINE)
    assert len(re.findall(r"= state ", text)) == 4
    assert re.search(r"graphwright\.int8_linear\.default\(.*\)  # model\.model\.layers\.0", text)
    with pytest.raises(InvalidArgument, match="no phase"):
        quantized().graph("encode")


def test_graphs_for_other_viewers_keep_names(tmp_path):
    program = quantized()
    graph = nx.read_graphml(program.write_graph("decode", tmp_path / "graph.graphml"))
    ET.parse(tmp_path / "graph.graphml")
    names = [node.name for node in program.phases["decode"].exported.graph.nodes]
    assert set(graph.nodes) == set(names)
    assert any(values["module"].endswith("layers.1.mlp.gate_proj") for _, values in graph.nodes(data=True))
    dot = program.write_graph("decode", tmp_path / "graph.dot").read_text()
    assert all(f'"{name}" [' in dot for name in names)
    assert 'label="model.model.layers.0.self_attn' in dot
    assert program.write_graph("decode", tmp_path / "graph.txt").read_text() == program.graph("decode") + "\n"


def test_a_pt2_of_a_phase_is_read_by_torch(tmp_path):
    path = canonical().write_graph("decode", tmp_path / "graph.pt2")
    names = {node.name for node in torch.export.load(path).graph.nodes}
    assert {node.name for node in canonical().phases["decode"].exported.graph.nodes} <= names


def test_dot_escapes_what_names_may_hold():
    graph = nx.DiGraph()
    graph.add_node('a"b\\', target="<x>\n", type="-", module='m"')
    assert '"a\\"b\\\\" [label="a\\"b\\\\\\n<x> \\n-"];' in dot_text(graph)


@pytest.mark.parametrize(("name", "error"), [("g.svg", InvalidArgument), ("no/g.dot", InvalidFile)])
def test_graphs_that_cannot_be_written(tmp_path, name, error):
    with pytest.raises(error):
        canonical().write_graph("decode", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_notebooks_get_text_and_no_markup_from_names():
    program = canonical()
    html = program._repr_html_()
    assert html.startswith("<pre")
    assert "prefill" in html
    assert "&lt;" in Inspection({"<b>": find_sites(GraphView(program.phases["decode"].exported))})._repr_html_()
