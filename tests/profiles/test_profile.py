"""The profile file: its schema, what it refuses, and what the fingerprint tells apart."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from graphwright.errors import GraphwrightError, InvalidFile, StaleProfile
from graphwright.passes.canonicalize import canonicalize
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.profiles import profile as profile_module
from graphwright.profiles.profile import (
    SCHEMA_VERSION,
    Fingerprint,
    Profile,
    data_hash,
    fingerprint,
    hardware,
    versions,
)
from tests.graph_text import functional

SCHEMA = Path(str(profile_module.__file__)).with_name("profile.schema.json")


def make() -> Profile:
    decision = Decision(
        site="main/fc/linear[0]",
        method="int8",
        pass_name="quantize_linear",
        status="rolled_back",
        reason="too much error",
        facts={"role": "up"},
        local_error=0.01,
        measured_gain=1.5,
    )
    return Profile(
        fingerprint=Fingerprint(graph="a" * 64, weights="b" * 64),
        methods=[{"name": "int8", "options": {"roles": ["up"]}}],
        decisions=[decision],
        versions=versions(),
        hardware=hardware(),
        data="c" * 64,
        measured={"budget": {"limit": -0.1}},
    )


def test_the_published_schema_is_current() -> None:
    """After a change of the model: write `Profile.model_json_schema()`; raise SCHEMA_VERSION if old files break."""
    assert json.loads(SCHEMA.read_text()) == Profile.model_json_schema()


def test_the_schema_says_what_each_field_is() -> None:
    schema = json.loads(SCHEMA.read_text())
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["fingerprint"]
    assert set(schema["$defs"]) == {"Decision", "Fingerprint", "StepRange", "StepSpan", "TensorFile"}
    assert schema["$defs"]["Decision"]["properties"]["site"]["description"]


def test_save_and_load(tmp_path) -> None:
    profile = make()
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile
    assert Profile.load(str(tmp_path / "p.json")) == profile
    assert json.loads((tmp_path / "p.json").read_text())["schema_version"] == SCHEMA_VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"], "no temporary file is left"


def test_an_existing_file_is_replaced(tmp_path) -> None:
    path = tmp_path / "p.json"
    path.write_text("old")
    make().save(path)
    assert Profile.load(path) == make()


def test_a_path_that_cannot_be_written(tmp_path) -> None:
    with pytest.raises(InvalidFile, match="missing"):
        make().save(tmp_path / "missing" / "p.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidFile, match="folder"):
        make().save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def changed(**fields) -> str:
    return json.dumps({**make().model_dump(mode="json"), **fields})


def in_decision(**fields) -> str:
    (decision,) = make().model_dump(mode="json")["decisions"]
    return changed(decisions=[{**decision, **fields}])


WRONG = {
    "missing": (None, InvalidFile, "No such file"),
    "empty": ("", InvalidFile, "not a JSON file"),
    "cut": ("{", InvalidFile, "not a JSON file"),
    "binary": (b"\xff\xfe\x00", InvalidFile, "not a JSON file"),
    "a list": ("[]", InvalidFile, "not a graphwright profile: the file"),
    "a number": ("3", InvalidFile, "not a graphwright profile"),
    "no fields": ("{}", InvalidFile, "not a graphwright profile: fingerprint: Field required"),
    "newer": (changed(schema_version=99), StaleProfile, f"schema version 99, this graphwright reads {SCHEMA_VERSION}"),
    "no version": (changed(schema_version="x"), StaleProfile, "schema version x"),
    "extra field": (changed(extra=1), InvalidFile, "extra: Extra inputs are not permitted"),
    "extra field of a decision": (in_decision(extra=1), InvalidFile, r"decisions\.0\.extra"),
    "unknown status": (in_decision(status="perhaps"), InvalidFile, r"decisions\.0\.status"),
    "no site": (in_decision(site=None), InvalidFile, r"decisions\.0\.site"),
    "a word for a number": (in_decision(local_error="much"), InvalidFile, r"decisions\.0\.local_error"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_one_clear_error(tmp_path, case) -> None:
    content, error, message = WRONG[case]
    path = tmp_path / "wrong.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message) as raised:
        Profile.load(path)
    assert isinstance(raised.value, GraphwrightError)
    assert "wrong.json" in str(raised.value)


def test_a_folder_is_no_profile(tmp_path) -> None:
    with pytest.raises(InvalidFile, match="directory"):
        Profile.load(tmp_path)


# ---- the fingerprint


class Mlp(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def canonical(model: nn.Module, rows: int = 3, dynamic: bool = False) -> ExportedProgram:
    shapes = ({0: Dim("rows", min=2, max=9)},) if dynamic else None
    exported = functional(model, torch.randn(rows, 4), dynamic_shapes=shapes)
    canonicalize(exported)
    return exported


def test_names_of_nodes_do_not_count() -> None:
    exported = canonical(Mlp())
    renamed = copy_exported(exported)
    for number, node in enumerate(renamed.graph.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{number}"
    assert fingerprint({"main": renamed}) == fingerprint({"main": exported})
    assert fingerprint({"main": canonical(Mlp())}) == fingerprint({"main": exported})


def test_names_of_symbols_and_example_sizes_do_not_count() -> None:
    first, second = canonical(Mlp(), 3, dynamic=True), canonical(Mlp(), 5, dynamic=True)
    assert fingerprint({"main": first}) == fingerprint({"main": second})
    assert fingerprint({"main": first}).graph != fingerprint({"main": canonical(Mlp())}).graph


@pytest.mark.parametrize("index", [(0, 0), (7, 3)], ids=str)
def test_a_changed_weight_counts(index) -> None:
    model = Mlp()
    with torch.no_grad():
        model.fc1.weight[index] += 1e-3
    before, after = fingerprint({"main": canonical(Mlp())}), fingerprint({"main": canonical(model)})
    assert before.graph == after.graph
    assert before.weights != after.weights


def test_shapes_operators_and_phases_count() -> None:
    class Other(Mlp):
        def forward(self, x):
            return self.fc2(self.fc1(x).sigmoid())

    base = {"main": canonical(Mlp())}
    others = [
        {"main": canonical(Mlp(16))},
        {"main": canonical(Mlp(), rows=5)},
        {"main": canonical(Other())},
        {"decode": canonical(Mlp())},
        {**base, "decode": canonical(Mlp())},
    ]
    graphs = [fingerprint(phases).graph for phases in (base, *others)]
    assert len(set(graphs)) == len(graphs)


def test_check_lists_the_fields_that_differ() -> None:
    profile = make()
    profile.check(profile.fingerprint)
    with pytest.raises(StaleProfile, match="graph is cccccccccccc, the profile's is aaaaaaaaaaaa") as raised:
        profile.check(Fingerprint(graph="c" * 64, weights="b" * 64))
    assert "weights" not in str(raised.value)
    with pytest.raises(StaleProfile, match=r"graph is .*; weights is"):
        profile.check(Fingerprint(graph="c" * 64, weights="d" * 64))


def test_the_data_s_hash() -> None:
    x = torch.arange(6.0)
    assert data_hash([]) == data_hash([[]]) == ""
    assert data_hash([[x, 1]]) == data_hash([[x.clone(), 1]])
    different = [[[x]], [[x + 1]], [[x.reshape(2, 3)]], [[x.double()]], [[x, 1]], [[x, 2]], [[x, x]], [[x[0]]]]
    hashes = [data_hash(inputs) for inputs in different]
    assert len(set(hashes)) == len(hashes)
    assert data_hash([[x.reshape(2, 3).t()]]) == data_hash([[x.reshape(2, 3).t().contiguous()]])
