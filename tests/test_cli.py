"""The command line, as a user runs it: what it prints, what it leaves behind, and one line for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphwright as gw
from tests.models import Mlp


def run(*arguments: object, code: str = "from graphwright.cli import main; main()") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


RUN_ALL = """
import contextlib, io, json, sys
import graphwright.cli as cli

results = {}
for name, arguments in json.load(open(sys.argv[1])).items():
    sys.argv = ["graphwright", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            status, _ = "raised", err.write(f"Traceback: {type(error).__name__}: {error}")
    results[name] = [status or 0, out.getvalue(), err.getvalue()]
json.dump(results, sys.stdout)
"""


def run_all(path: Path, commands: dict[str, list[str]]) -> dict[str, list]:
    """Name -> (status, stdout, stderr). One process: starting one and importing torch takes longer than a command."""
    path.write_text(json.dumps(commands))
    result = run(path, code=RUN_ALL)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


FC1, HEAD = "main/fc1/linear[0]", "int8:roles=[head],skip=[fc1]"
RIGHT = {
    "optimize": ("optimize", "mlp.pt2", "-m", "int8", "--keep", "smaller", "-o", "mlp.gw"),
    "inspect": ("inspect", "mlp.pt2"),
    "inspect as json": ("inspect", "mlp.pt2", "--json"),
    "report": ("report", "mlp.gw"),
    "report as json": ("report", "mlp.gw", "--json"),
    "report of a site": ("report", "mlp.gw", "--site", FC1),
    "diff": ("diff", "mlp.gw"),
    "explain": ("explain", "mlp.gw", FC1),
    "page": ("report", "mlp.gw", "--html", "page.html"),
    "graph": ("graph", "mlp.gw"),
    "graph for Graphviz": ("graph", "mlp.gw", "-o", "mlp.dot"),
    "methods": ("methods",),
    "help": ("--help",),
    "options": ("optimize", "mlp.pt2", "-m", HEAD, "--keep", "smaller", "--json", "--save-profile", "p", "-o", "a.gw"),
    "profile": ("optimize", "mlp.pt2", "--profile", "p", "--json", "-o", "b.gw"),
    "bisect": ("bisect", "mlp.gw", "--against", "mlp.pt2", "--tolerance", "0.5"),
    "export": ("export", "mlp.gw", "-o", "mlp.onnx"),
    "export as json": ("export", "mlp.gw", "-o", "mlp.onnx", "--ops", "function", "--opset", "24", "--json"),
    "dry run": ("export", "mlp.gw", "-o", "mlp.onnx", "--dry-run", "--ops", "ort"),
    "bundle": ("export", "mlp.gw", "-o", "mlp.zip", "--capability", "sm_89"),
    "dry run as json": ("export", "mlp.gw", "-o", "mlp.engine", "--dry-run", "--json"),
    "diff of two": ("diff", "mlp.gw", "a.gw"),
    "diff of two as json": ("diff", "mlp.gw", "a.gw", "--json"),
    "diff of two graphs": ("diff", "mlp.gw", "a.gw", "--phase", "main"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a small model lies as .pt2."""
    path = tmp_path_factory.mktemp("cli")
    torch.export.save(torch.export.export(Mlp().eval(), (torch.randn(4, 32),)), path / "mlp.pt2")
    return path


@pytest.fixture(scope="module")
def printed(folder) -> dict[str, str]:
    """What each command of `RIGHT` printed."""
    files = ("mlp.pt2", "mlp.gw", "a.gw", "b.gw", "p", "page.html", "mlp.dot", "mlp.onnx", "mlp.zip")
    commands = {
        name: [str(folder / part) if part in files else part for part in parts] for name, parts in RIGHT.items()
    }
    results = run_all(folder / "right.json", commands)
    for name, (status, _, stderr) in results.items():
        assert status == 0, f"{name}: {stderr}"
        assert "Traceback" not in stderr
    return {name: stdout for name, (_, stdout, _) in results.items()}


def test_optimize_writes_a_program_and_reports(folder, printed) -> None:
    for expected in ("quantize_linear", "role head is not asked for", "1 refused"):
        assert expected in printed["optimize"]
    x = torch.randn(4, 32)
    program = gw.load(folder / "mlp.gw")
    assert [decision.status for decision in program.decisions] == ["kept", "refused"]
    torch.testing.assert_close(program(x), Mlp()(x), rtol=0.1, atol=0.05)


def test_inspect(printed) -> None:
    assert "2 linear" in printed["inspect"]
    assert "fc1" in printed["inspect"]
    data = json.loads(printed["inspect as json"])
    assert [(site["module"], site["role"]) for site in data["main"]["sites"]] == [("fc1", "up"), ("fc2", "head")]


def test_report(printed) -> None:
    assert "quantize_linear" in printed["report"]
    assert [decision["status"] for decision in json.loads(printed["report as json"])["decisions"]] == [
        "kept",
        "refused",
    ]
    assert printed["report of a site"].startswith(FC1)
    assert "status: kept" in printed["report of a site"]


def test_diff(printed) -> None:
    assert any(line.startswith("+") and "graphwright.int8_linear" in line for line in printed["diff"].splitlines())


def test_diff_of_two_programs(printed) -> None:
    assert "2 decisions differ" in printed["diff of two"]
    data = json.loads(printed["diff of two as json"])
    assert [row[0] for row in data["decisions"]] == [FC1, "main/fc2/linear[0]"]
    assert data["operators"]["main"] == []
    changed = [line for line in printed["diff of two graphs"].splitlines() if line.startswith(("+", "-"))]
    assert any(line.startswith("+") and "int8_linear" in line and "fc2" in line for line in changed)


def test_explain_has_the_whole_chain(printed) -> None:
    text = printed["explain"]
    for expected in (
        "role: up",
        "int8 decided",
        "guard of quantize_linear",
        "pass quantize_linear",
        "now in the graph",
    ):
        assert expected in text
    assert text == printed["report of a site"]


def test_bisect(folder, printed) -> None:
    assert "holds the tolerance" in printed["bisect"]
    arguments = ("bisect", folder / "mlp.gw", "--against", folder / "mlp.pt2", "--tolerance", "1e-7", "--json")
    result = run(*arguments)
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout)["culprit"] == "fc1/linear[0]"


def test_the_page_and_graphs_are_written(folder, printed) -> None:
    assert printed["page"].strip() == str(folder / "page.html")
    assert (folder / "page.html").read_text().startswith("<!doctype html>")
    assert "graphwright.int8_linear" in printed["graph"]
    assert (folder / "mlp.dot").read_text().startswith("digraph {")


def test_export(folder, printed) -> None:
    names = [line.split("  ")[0] for line in printed["export"].splitlines()]
    assert names == [str(folder / "mlp.onnx"), str(folder / "mlp.onnx.data")]
    assert list(json.loads(printed["export as json"])) == names
    assert printed["bundle"].startswith(str(folder / "mlp.zip"))
    x = torch.randn(4, 32)
    torch.testing.assert_close(gw.load(folder / "mlp.onnx")(x), gw.load(folder / "mlp.gw")(x), rtol=1e-5, atol=1e-6)


def test_dry_run_says_what_operators_become(printed) -> None:
    assert "MatMulIntegerToFloat (com.microsoft)" in printed["dry run"]
    (row,) = json.loads(printed["dry run as json"])["phases"]["main"]
    assert row["becomes"] == "DequantizeLinear of an 8-bit weight, MatMul"


def test_methods_and_help_name_what_there_is(printed) -> None:
    assert "int8" in printed["methods"]
    assert "roles" in printed["methods"]
    for command in ("inspect", "optimize", "report", "explain", "graph", "export", "diff", "methods", "bench", "demo"):
        assert command in printed["help"]


def test_method_options_and_profiles(folder, printed) -> None:
    decided = {d["facts"]["role"]: d["status"] for d in json.loads(printed["options"])["decisions"]}
    assert decided == {"up": "refused", "head": "kept"}
    x = torch.randn(4, 32)
    assert torch.equal(gw.load(folder / "a.gw")(x), gw.load(folder / "b.gw")(x))


WRONG = {
    "missing model": (("inspect", "{tmp}/no.pt2"), "no.pt2"),
    "missing program": (("report", "{tmp}/no.gw"), "no.gw"),
    "foreign model": (("inspect", "{tmp}/foreign"), "foreign"),
    "foreign program": (("diff", "{tmp}/foreign"), "foreign"),
    "model as program": (("report", "{folder}/mlp.pt2"), "mlp.pt2"),
    "unknown method": (("optimize", "{folder}/mlp.pt2", "-m", "int9", "-o", "{tmp}/out.gw"), "unknown method 'int9'"),
    "unknown method option": (
        ("optimize", "{folder}/mlp.pt2", "-m", "int8:rank=3", "-o", "{tmp}/out.gw"),
        "rank: Extra inputs are not permitted",
    ),
    "method option without value": (
        ("optimize", "{folder}/mlp.pt2", "-m", "int8:roles", "-o", "{tmp}/out.gw"),
        "'roles' is not name=value",
    ),
    "unknown role": (
        ("optimize", "{folder}/mlp.pt2", "-m", "int8:roles=[z]", "-o", "{tmp}/out.gw"),
        "unknown role 'z'",
    ),
    "unknown option": (("inspect", "{folder}/mlp.pt2", "--verbose-please"), "--verbose-please"),
    "unknown command": (("opimize",), "opimize"),
    "no output": (("optimize", "{folder}/mlp.pt2"), "--output"),
    "output folder missing": (("optimize", "{folder}/mlp.pt2", "-o", "{tmp}/no/out.gw"), "there is no folder"),
    "profile folder missing": (
        ("optimize", "{folder}/mlp.pt2", "-o", "{tmp}/out.gw", "--save-profile", "{tmp}/no/p.json"),
        "there is no folder",
    ),
    "missing profile": (
        ("optimize", "{folder}/mlp.pt2", "-o", "{tmp}/out.gw", "--profile", "{tmp}/no.json"),
        "no.json",
    ),
    "foreign profile": (
        ("optimize", "{folder}/mlp.pt2", "-o", "{tmp}/out.gw", "--profile", "{tmp}/foreign"),
        "foreign",
    ),
    "unknown architecture": (
        ("export", "{folder}/mlp.gw", "-o", "{tmp}/mlp.zip", "--capability", "sm_75"),
        "compiled for sm_80, sm_89, sm_90, got 'sm_75'",
    ),
    "unknown size": (
        ("export", "{folder}/mlp.gw", "-o", "{tmp}/mlp.engine", "--size", "x=1,2,3"),
        "size 'x=1,2,3' is not INPUT:DIMENSION=LEAST,USUAL,LARGEST",
    ),
    "unknown keep": (("optimize", "{folder}/mlp.pt2", "--keep", "all", "-o", "{tmp}/out.gw"), "keep must be"),
    "budget without methods": (("optimize", "{folder}/mlp.pt2", "--max-error", "1", "-o", "{tmp}/out.gw"), "a budget"),
    "negative budget": (
        ("optimize", "{folder}/mlp.pt2", "-m", "int8", "--max-error", "-1", "-o", "{tmp}/out.gw"),
        "Budget: max_error: Input should be greater than 0",
    ),
    "a word for a number": (
        ("optimize", "{folder}/mlp.pt2", "-m", "int8", "--max-error", "little", "-o", "{tmp}/out.gw"),
        "--max-error",
    ),
    "unknown site": (("report", "{folder}/mlp.gw", "--site", "main/fc3/linear[0]"), "near it"),
    "unknown site to explain": (("explain", "{folder}/mlp.gw", "main/fc3/linear[0]"), "near it"),
    "page in a folder that is missing": (
        ("report", "{folder}/mlp.gw", "--html", "{tmp}/no/page.html"),
        "there is no folder",
    ),
    "tolerance of nothing": (
        ("bisect", "{folder}/mlp.gw", "--against", "{folder}/mlp.pt2", "--tolerance", "0"),
        "positive",
    ),
    "bisect without a model": (("bisect", "{folder}/mlp.gw", "--tolerance", "1"), "--against"),
    "unknown graph format": (("graph", "{folder}/mlp.gw", "-o", "{tmp}/mlp.svg"), "no graph format '.svg'"),
    "graph of an unknown phase": (("graph", "{folder}/mlp.gw", "--phase", "encode"), "no phase 'encode'"),
    "diff with a foreign program": (("diff", "{folder}/mlp.gw", "{tmp}/foreign"), "foreign"),
    "diff with an unknown phase": (
        ("diff", "{folder}/mlp.gw", "{folder}/a.gw", "--phase", "encode"),
        "no phase 'encode'",
    ),
    "unknown phase": (("diff", "{folder}/mlp.gw", "--phase", "encode"), "no phase 'encode'"),
    "unknown table": (("bench", "moon"), "unknown table 'moon'; there are spine, video"),
}


@pytest.fixture(scope="module")
def refused(folder, printed, tmp_path_factory):
    """Case -> (status, stdout, stderr), and what lies in the folder afterwards."""
    tmp = tmp_path_factory.mktemp("wrong")
    (tmp / "foreign").write_text("not a model")
    commands = {name: [part.format(tmp=tmp, folder=folder) for part in parts] for name, (parts, _) in WRONG.items()}
    return run_all(folder / "wrong.json", commands), sorted(path.name for path in tmp.iterdir())


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_line_and_status_2(refused, name) -> None:
    status, _, stderr = refused[0][name]
    assert status == 2, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("graphwright: ")
    assert WRONG[name][1] in stderr
    assert "Traceback" not in stderr


def test_bad_input_leaves_no_file(refused) -> None:
    assert refused[1] == ["foreign"]


def test_bad_input_in_a_process_of_its_own(tmp_path) -> None:
    result = run("inspect", tmp_path / "no.pt2")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [f"graphwright: {tmp_path / 'no.pt2'}: no such file"]


def test_importing_graphwright_is_quick() -> None:
    code = """
import time, torch
started = time.perf_counter()
import graphwright
print(time.perf_counter() - started)
"""
    result = run(code=code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.0, "0.5 s is promised; machines that run tests are shared"


@pytest.mark.parametrize(
    "first",
    ["import graphwright.optimize", "import graphwright as gw; gw.optimize", "from graphwright import optimize"],
)
def test_optimize_stays_the_function(first) -> None:
    code = f"""
{first}
import graphwright, graphwright.optimize, graphwright.capture
from graphwright.prepare import prepare
assert callable(graphwright.optimize) and callable(graphwright.capture)
assert graphwright.optimize.__module__ == "graphwright.optimize"
"""
    result = run(code=code)
    assert result.returncode == 0, result.stderr
