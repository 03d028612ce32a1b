"""What a page is given: graphs after each pass, decisions, pictures; and what it says where something is missing."""

from __future__ import annotations

import base64
import json
import re
import zlib

import networkx as nx
import pytest
import torch

import graphwright as gw
from graphwright.errors import InvalidArgument, InvalidFile
from graphwright.html_report.graph_data import MISSING
from graphwright.html_report.module_groups import MOST_MEMBERS, group_nodes, layers_of
from graphwright.html_report.picture import Picture, makers, picture
from graphwright.html_report.png import png_address
from graphwright.html_report.write import page_data, page_text
from graphwright.patterns.rows import rows_of
from tests.html_report.programs import HOSTILE, canonical, long_program, quantized


@pytest.fixture(scope="module")
def data() -> dict:
    return page_data(quantized())


def alive(phase: dict, step: int) -> set[int]:
    """The nodes after a step, as the page works them out."""
    found = set(phase["last"])
    for later in phase["steps"][:step:-1]:
        found = (found - set(later["added"])) | set(later["removed"])
    return found


def test_the_page_can_show_every_graph_from_the_captured_one_on(data):
    for name, phase in data["phases"].items():
        names = [data["strings"][n] for n in phase["nodes"]["name"]]
        final = rows_of(quantized().phases[name].exported)
        assert {names[i] for i in alive(phase, len(phase["steps"]) - 1)} == set(final)
        plain = rows_of(canonical().phases[name].exported)
        assert {names[i] for i in alive(phase, phase["canonical"])} == set(plain)
        calls = [node for node in captured_nodes() if node.op in ("call_function", "output")]
        assert {node.name for node in calls} <= {names[i] for i in alive(phase, 0)}


def captured_nodes():
    from tests.models import captured_llama

    return captured_llama().exported.graph.nodes


def test_groups_have_few_members_and_every_node_has_one(data):
    for phase in data["phases"].values():
        members = [0] * len(phase["groups"])
        for parent in [*phase["nodes"]["parent"], *(group[2] for group in phase["groups"][1:])]:
            members[parent] += 1
        assert max(members) <= MOST_MEMBERS
        assert min(members) > 0
        assert len(phase["nodes"]["layer"]) == len(phase["nodes"]["name"])


def test_layers_are_topological_generations():
    graph = nx.DiGraph([(0, 1), (1, 2), (0, 3), (3, 2), (4, 2)])
    assert layers_of(graph) == {0: 0, 1: 1, 3: 1, 2: 2, 4: 1}  # 4 has no input: it stands above its reader
    assert layers_of(nx.DiGraph([(0, 1), (1, 0), (1, 2)])) == {0: 0, 1: 0, 2: 1}


def test_a_module_with_many_nodes_is_split_into_runs_of_neighbours():
    count = 5000
    names = [f"n{i}" for i in range(count)]
    tree = group_nodes(names, ["m"] * count, [(i, i + 1) for i in range(count - 1)])
    assert max(len(group.members) for group in tree.groups) <= MOST_MEMBERS
    assert len(set(tree.parents)) == count / MOST_MEMBERS
    for group in tree.groups:
        nodes = [member for member in group.members if member >= 0]
        assert nodes == list(range(nodes[0], nodes[0] + len(nodes))) if nodes else True


def test_a_module_in_which_there_is_only_one_other_is_drawn_as_one_with_it():
    names, modules = [f"n{i}" for i in range(9)], ["", *["a.b"] * 4, *["a.b.c"] * 4]
    tree = group_nodes(names, modules, [])
    assert [group.label for group in tree.groups] == ["", "a.b", "c"]
    assert tree.parents == [0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_a_numbered_module_keeps_the_name_of_its_list():
    tree = group_nodes([f"n{i}" for i in range(8)], [*["layers.0"] * 4, *["layers.1"] * 4], [])
    assert [group.label for group in tree.groups] == ["", "layers", "layers.0", "layers.1"]


def test_names_cannot_become_markup(tmp_path):
    program = canonical()
    facts = program.facts
    program.facts = facts | {"name": HOSTILE}
    program.note(HOSTILE, HOSTILE, HOSTILE)
    try:
        text = page_text(program)
    finally:
        program.facts = facts
        program.history.measured.pop("figures")
    assert HOSTILE not in text
    assert "<img src=x" not in text
    assert text.count("</script>") == 2
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    assert json.loads(found[1])["title"] == f"{HOSTILE}, causal_lm"


def test_only_the_page_s_own_script_may_run():
    text = page_text(canonical())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "script-src 'sha256-" in policy[1]
    assert not re.search(r'(?:src|href)="https?:', text)


def test_a_program_of_an_earlier_version_says_what_is_missing(tmp_path):
    quantized().save(tmp_path / "new.gw")
    program = gw.load(tmp_path / "new.gw")
    for position, record in enumerate(program.history.passes):
        program.history.passes[position] = type(record)(**{**vars(record), "undo": None})
    phase = page_data(program)["phases"]["prefill"]
    assert phase["missing"] == MISSING
    assert [step["name"] for step in phase["steps"]] == ["final"]
    assert len(phase["last"]) == len(phase["nodes"]["name"])


def test_a_file_of_a_version_that_kept_no_graphs_loads(monkeypatch, tmp_path):
    from graphwright import program_file

    plain = program_file._plain

    def without(record):
        return {name: value for name, value in plain(record).items() if name != "undo"}

    monkeypatch.setattr(program_file, "_plain", without)
    quantized().save(tmp_path / "old.gw")
    old = gw.load(tmp_path / "old.gw")
    assert all(record.undo is None for record in old.history.passes)
    assert {phase["missing"] for phase in page_data(old)["phases"].values()} == {MISSING}
    assert "status: " in old.explain(old.decisions[0].site)


def test_nothing_measured_says_what_and_how():
    summary = page_data(canonical())["summary"]
    assert [each["what"] for each in summary["missing"]] == [
        "No method was asked for: this is the canonical program, exact.",
        "Time before and after was not measured.",
    ]
    assert "program.note(" in summary["missing"][1]["how"]


def test_measured_figures_are_in_the_summary_and_in_the_file(tmp_path):
    program = gw.load(saved(quantized(), tmp_path))
    program.note("prefill", "2.00 s", "1.00 s", "2.00x faster")
    again = gw.load(saved(program, tmp_path))
    rows = page_data(again)["summary"]["figures"]
    assert rows[-1] == {"name": "prefill", "before": "2.00 s", "after": "1.00 s", "note": "2.00x faster"}
    weights = rows[0]
    assert float(weights["before"].split()[0]) > float(weights["after"].split()[0])


def saved(program, folder):
    path = folder / f"{len(list(folder.iterdir()))}.gw"
    program.save(path)
    return path


def test_decisions_say_what_was_predicted_measured_and_why(data):
    rows = {row["status"] for row in data["decisions"]}
    assert rows == {"kept", "refused", "rolled_back"}
    assert all(row["reason"] for row in data["decisions"] if row["status"] != "kept")
    assert all(row["measured"] > 0 and row["predicted"] > 0 for row in data["decisions"] if row["status"] == "kept")


def test_pictures_of_a_budget(data):
    titles = [each["title"] for each in data["pictures"]]
    assert titles[:2] == ["Budget: error against what is kept", "Predicted against measured gain"]
    heat = next(each for each in data["pictures"] if each["kind"] == "heatmap")
    assert heat["rows"] == ["layers.0", "layers.1"]
    assert heat["columns"] == ["q", "k", "v", "o", "gate", "up", "down"]


def test_pictures_of_what_methods_measured(tmp_path):
    program = gw.load(saved(quantized(), tmp_path))
    program.profile.measured |= {
        "astraea": {"table": [20, 10, 10, 20], "budget": 0.75},
        "kvtuner": {
            "trials": [{"bits": 4.0, "value": 0.2}, {"bits": 8.0, "value": 0.1}],
            "front": [{"bits": 4.0, "value": 0.2}],
            "bits": 4.0, "value": 0.2, "limit": 5.0, "objective": "loss", "table": [[4, 2], [8, 8]],
        },
    }  # fmt: skip
    program.history.measured["reuse"] = {
        "steps": [{"timestep": 1000.0, "layers": {"blocks.0/attention[0]": 0.1}}, {"timestep": 500.0, "layers": {}}]
    }
    found = {each["title"]: each for each in page_data(program)["pictures"]}
    assert found["Tokens computed by step"]["series"][0]["values"] == [1.0, 0.5, 0.5, 1.0]
    assert found["Scores reused by layer and step"]["values"] == [[0.1, None]]
    assert found["Bits of the cache by layer"]["values"] == [[4, 8], [2, 8]]
    assert [each["name"] for each in found["Bits against loss"]["series"]] == ["tables tried", "Pareto front", "chosen"]


def test_masks_and_frames_of_a_video(tmp_path):
    from graphwright.html_report.method_pictures import _shrunk

    blue = _shrunk(torch.eye(4, dtype=torch.bool))[..., 0] < 100
    assert torch.equal(blue, torch.eye(4, dtype=torch.bool))
    assert max(_shrunk(torch.ones(300, 300, dtype=torch.bool)).shape) <= 128
    program = gw.load(saved(quantized(), tmp_path))
    frame = [(0, png_address(torch.zeros(4, 4, 3, dtype=torch.uint8)))]
    program.history.measured["video_frames"] = [{"dense": frame, "rewritten": frame}]
    picture = page_data(program)["pictures"][-1]
    assert [row["label"] for row in picture["rows"]] == ["dense", "rewritten"]
    assert picture["rows"][0]["images"][0]["source"].startswith("data:image/png;base64,")
    assert "video_frames" not in program.report().to_json()["measured"]


def test_a_method_adds_a_picture_with_one_function(monkeypatch):
    monkeypatch.setattr("graphwright.html_report.picture.PICTURES", list(makers()))
    from graphwright.html_report import picture as module

    @picture
    def hits(program):
        return Picture("Hits", "bars", {"labels": ["a"], "unit": "hits", "series": [{"name": "n", "values": [1]}]})

    assert module.PICTURES[-1] is hits
    assert page_data(canonical())["pictures"][-1]["title"] == "Hits"


def test_png():
    image = torch.arange(12, dtype=torch.uint8).view(2, 2, 3)
    data = base64.b64decode(png_address(image).partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    start = data.index(b"IDAT") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big")
    assert zlib.decompress(data[start : start + length]) == bytes([0, *range(6), 0, *range(6, 12)])
    with pytest.raises(InvalidArgument, match="expected uint8"):
        png_address(image.float())


def test_a_page_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InvalidFile, match="cannot be written"):
        canonical().html(tmp_path / "no" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InvalidFile, match="cannot be written"):
        canonical().html(tmp_path / "folder.html")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_the_bundle_is_built_from_the_sources():
    import hashlib
    from pathlib import Path

    page = Path(gw.__file__).parent / "html_report" / "page"
    digest = hashlib.sha256()
    for path in [*sorted((page / "src").iterdir()), page / "package-lock.json"]:
        digest.update(path.read_bytes())
    bundle = (page.parent / "assets" / "page.min.js").read_text()
    assert f"sources {digest.hexdigest()[:16]}" in bundle.splitlines()[0], "run npm ci && npm run build"
    licences = (page.parent / "assets" / "LICENCES.txt").read_text()
    for name in ("@dagrejs/dagre", "d3-zoom", "d3-selection"):
        assert re.search(rf"^{name} [\d.]+, (MIT|ISC)", licences, re.MULTILINE)


def test_ten_thousand_nodes_are_written_quickly_and_closed():
    phase = page_data(long_program(10_000))["phases"]["main"]
    assert len(phase["nodes"]["name"]) >= 10_000
    assert len([group for group in phase["groups"] if group[2] == 0]) <= MOST_MEMBERS
