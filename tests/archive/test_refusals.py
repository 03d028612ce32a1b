"""Files that must not be believed: every forgery is refused with the place and the value, and nothing runs."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from graphwright.archive.container import Contents, read_archive, write_archive
from graphwright.errors import InvalidFile

Manifest = dict[str, Any]


class Small(nn.Module):
    """A convolution kept in another memory order, a scalar buffer, a keyword argument and two dynamic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1).to(memory_format=torch.channels_last)
        self.register_buffer("scale", torch.tensor(3, dtype=torch.int32))

    def forward(self, x: Tensor, *, picture: Tensor) -> dict[str, Any]:
        mask = torch.full((x.shape[0], x.shape[0]), -torch.inf).triu(1)
        return {"values": [torch.softmax(x @ x.t() + mask, -1), x.shape[0]], "picture": self.conv(picture) * self.scale}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    shapes = {"x": {0: Dim("rows", min=2, max=64)}, "picture": {2: Dim("height", min=3, max=40)}}
    inputs = (torch.randn(5, 8),), {"picture": torch.randn(1, 2, 8, 4)}
    program = torch.export.export(Small(), *inputs, dynamic_shapes=shapes, strict=False).run_decompositions({})
    path = tmp_path_factory.mktemp("original") / "small.gw"
    write_archive(path, Contents({"dense": program}, {"profile": {"bits": 4}}))
    return path.read_bytes()


@pytest.fixture
def saved(original: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "small.gw"
    path.write_bytes(original)
    return path


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Pack the members again after ``change``; sizes in the manifest follow, as they would in a forged file."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    change(members)
    manifest = json.loads(members["manifest.json"])
    manifest["sizes"] = {name: len(text) for name, text in members.items() if name != "manifest.json"}
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)


def tamper(path: Path, member: str, change: Callable[[bytes], bytes]) -> None:
    rewrite(path, lambda members: members.update({member: change(members[member])}))


def tamper_graph(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    def edit(text: bytes) -> bytes:
        graph = json.loads(text)
        change(graph)
        return json.dumps(graph).encode()

    tamper(path, "graphs/dense.json", edit)


def call(graph: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in graph["nodes"] if node["op"] == "call_function")


def test_a_forged_file_that_changes_nothing_is_read(saved):
    rewrite(saved, lambda members: None)
    assert read_archive(saved).documents == {"profile": {"bits": 4}}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.ops.aten.add.Tensor.__class__", "is not an operator of torch.ops"),
        ("torch.ops.aten.add", "is not an operator of torch.ops"),
        ("_operator.attrgetter", "is not an operator of torch.ops"),
        ("operator.attrgetter", "is not an operator of torch.ops"),
        ("operator.methodcaller", "is not an operator of torch.ops"),
        ("torch.hub.load", "is not an operator of torch.ops"),
        ("torch.ops.load_library", "is not an operator of torch.ops"),
        ("torch.ops.higher_order.cond.default", "is not an operator of torch.ops"),
        ("torch.ops.profiler.record.default", "is not an operator of torch.ops"),
        ("torch.ops.aten.__class__.mro", "is not registered"),
        ("torch.ops.aten.name.upper", "is not registered"),
        ("torch.ops.aten.add.__init__", "is not registered"),
        ("torch.ops.graphwright.no_such_kernel.default", "is not registered in this process; import its module"),
        ("torch.ops.aten.from_file.default", "does more than compute"),
        ("torch.ops.aten.save.default", "does more than compute"),
        ("torch.ops.aten.manual_seed.default", "does more than compute"),
        ("#extension:op", "is not an operator of torch.ops"),
        (["torch"], "is not an operator"),
    ],
)
def test_foreign_operators_are_refused(saved, target, message):
    tamper_graph(saved, lambda graph: call(graph).update(target=target))
    with pytest.raises(InvalidFile, match=message) as caught:
        read_archive(saved)
    assert str(target) in str(caught.value)
    assert str(caught.value).startswith(f"{saved}: graphs/dense.json: node ")


def size_of_first_call(graph: dict[str, Any], size: Any) -> None:
    call(graph)["val"] = {"sym_int": size}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("__import__('os').system('true')", "unknown symbol"),
        (["__import__", "os"], "unknown function '__import__'"),
        (["sympify", "1"], "unknown function 'sympify'"),
        (["Pow", 9, ["Pow", 9, ["Pow", 9, 9]]], "has no value of 64 bits|exponent"),
        (["PowByNatural", 2, 10**9], "exponent"),
        (["LShift", 1, 10**12], "exponent"),
        (["Pow", 2, "SYMBOL"], "exponent"),
        (["Add", *([1] * 5000)], "more than 2000 terms"),
        (["Mod", "SYMBOL", 0], "damaged or foreign .*ZeroDivisionError|AssertionError"),
        (10**40, "is not a number of 64 bits"),
        ({}, "is not a number of 64 bits"),
    ],
)
def test_sizes_are_built_and_never_evaluated(saved, size, message):
    def change(graph: dict[str, Any]) -> None:
        symbol = next(iter(graph["symbols"]))
        size_of_first_call(graph, json.loads(json.dumps(size).replace("SYMBOL", symbol)))

    tamper_graph(saved, change)
    with pytest.raises(InvalidFile, match=message) as caught:
        read_archive(saved)
    assert "graphs/dense.json" in str(caught.value)


INJECTION = "x = __import__('os').system('true') or x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: call(graph).update(name=INJECTION), "is not a name that code may hold"),
        (lambda graph: call(graph).update(name="import"), "means something in code"),
        (lambda graph: call(graph).update(kwargs={INJECTION: 1}), "is not a name that code may hold"),
        (lambda graph: graph["nodes"][0].update(target=INJECTION), "is not a name that code may hold"),
        (lambda graph: graph["call"].update(names=[INJECTION, "picture"]), "is not a name that code may hold"),
        (
            lambda graph: graph["call"]["arguments"][1][1].__setitem__(2, [INJECTION]),
            "is not a name that code may hold",
        ),
        (lambda graph: graph["signature"]["inputs"][0].__setitem__(2, 'a"b'), "not the qualified name of a tensor"),
        (lambda graph: graph["signature"]["inputs"][0].__setitem__(2, "__class__.x"), "not the qualified name"),
        (lambda graph: graph["signature"]["inputs"][0].__setitem__(0, "CUSTOM_OBJ"), "unknown kind of input"),
        (lambda graph: graph["signature"]["inputs"][0].__setitem__(1, ["constant", "a", "'+x"]), "holds quotes"),
        (lambda graph: graph["call"].update(result=["slice", []]), "unknown container 'slice'|damaged"),
        (lambda graph: graph["call"].update(arguments=["list", []]), "not a tuple and a dict"),
        (lambda graph: call(graph).update(op="call_module"), "'call_module' is not a kind of node"),
        (lambda graph: call(graph).update(op="get_attr"), "'get_attr' is not a kind of node"),
        (lambda graph: call(graph).update(args=["later"]), "is not an earlier node"),
        (lambda graph: call(graph).update(args=[{"pickle": "gASV"}]), "unknown kind of argument 'pickle'"),
        (lambda graph: call(graph).update(args=[{"device": "cpu; x"}]), "is not a device"),
        (lambda graph: call(graph).update(args=[{"dtype": "nn"}]), "unknown dtype 'nn'"),
        (lambda graph: call(graph).update(val={"tensor": ["float32", [[]], [1], "cpu", False]}), "damaged or foreign"),
        (lambda graph: call(graph).update(name=graph["nodes"][0]["name"]), "the name is used twice"),
        (lambda graph: call(graph).update(stack=10**6), "damaged or foreign"),
        (lambda graph: call(graph).update(trace=0, custom="text"), "damaged or foreign"),
        (lambda graph: graph["traces"].__setitem__(0, ["not", "text"]), "is not text"),
        (lambda graph: graph.update(dialect="EDGE"), "unknown dialect 'EDGE'"),
        (lambda graph: graph["symbols"].update({"os.system": {}}), "is not the name of a symbol"),
        (lambda graph: graph["symbols"].update(s0={"assume": ["__class__"]}), "unknown assumption"),
        (lambda graph: graph["nodes"].pop(), "damaged or foreign"),
        (lambda graph: graph.pop("nodes"), "damaged or foreign"),
    ],
)
def test_forged_graphs_are_refused(saved, change, message):
    tamper_graph(saved, change)
    with pytest.raises(InvalidFile, match=message) as caught:
        read_archive(saved)
    assert str(caught.value).startswith(f"{saved}: graphs/dense.json: ")


def test_texts_that_are_kept_reach_no_code(saved):
    """Stack traces, module names, annotations and text arguments may say anything."""

    def change(graph: dict[str, Any]) -> None:
        graph["traces"] = [f"\n{INJECTION}\n"] * len(graph["traces"])
        graph["stacks"] = [[[f"\n{INJECTION}", INJECTION, INJECTION]]] * len(graph["stacks"])
        call(graph).update(custom={"note": f"\n{INJECTION}"}, torch_fn=[INJECTION, INJECTION])

    tamper_graph(saved, change)
    loaded = read_archive(saved).phases["dense"]
    loaded.module()(torch.ones(3, 8), picture=torch.ones(1, 2, 4, 4))
    assert "__import__" not in loaded.graph_module.code
    assert "__import__" not in loaded.module().code


def set_manifest(path: Path, change: Callable[[Manifest], Any]) -> None:
    def edit(text: bytes) -> bytes:
        manifest = json.loads(text)
        change(manifest)
        return json.dumps(manifest).encode()

    tamper(path, "manifest.json", edit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(version=2), "format version 2, made by graphwright"),
        (lambda manifest: manifest.update(format="zip"), "does not describe a graphwright archive"),
        (lambda manifest: manifest["phases"].update(more={}), "does not list the members .*more"),
        (lambda manifest: manifest["phases"].update({"../x": {}}), "cannot be the name of a member"),
        (lambda manifest: manifest["table"].pop("scale"), "the names in the safetensors header"),
        (lambda manifest: manifest["table"]["scale"].update(dtype="int64"), "scale is I32"),
        (lambda manifest: manifest["table"]["scale"].update(shape=[-1]), "-1 is not a size"),
        (lambda manifest: manifest["table"]["scale"].update(shape=[2**40, 2**40]), "no tensor has the shape"),
        (lambda manifest: manifest["table"]["scale"].update(device="meta"), "a tensor without data"),
        (lambda manifest: manifest["table"]["scale"].update(device="cuda:77"), "this machine does not have"),
        (lambda manifest: manifest["table"]["conv.weight"].update(stored=[2**40, 1, 1, 1]), "without gaps"),
        (lambda manifest: manifest["table"].update(bomb=fill([2**40])), "the state takes 4398046511104 bytes"),
        (lambda manifest: manifest["table"].update(odd=fill([2], "00")), "is not one element"),
        (lambda manifest: manifest["table"].update(view=view("scale", 1, [1], [1])), "does not lie inside scale"),
        (lambda manifest: manifest["table"].update(view=view("scale", 0, [9], [1])), "does not lie inside scale"),
        (lambda manifest: manifest["table"].update(view=view("view", 0, [1], [1])), "which is no stored tensor"),
        (lambda manifest: manifest["phases"]["dense"]["state"].update(x="y"), "has no tensor 'y'"),
        (lambda manifest: manifest.pop("table"), "damaged or foreign"),
    ],
)
def test_forged_manifests_are_refused(saved, change, message):
    set_manifest(saved, change)
    with pytest.raises(InvalidFile, match=message) as caught:
        read_archive(saved)
    assert str(caught.value).startswith(f"{saved}: ")


def fill(shape: list[int], element: str = "00000000") -> dict[str, Any]:
    return {"dtype": "float32", "shape": shape, "device": "cpu", "fill": element}


def view(base: str, offset: int, shape: list[int], strides: list[int]) -> dict[str, Any]:
    return {"dtype": "int32", "shape": shape, "device": "cpu", "view": [base, offset, strides]}


def header(text: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    (length,) = struct.unpack("<Q", text[:8])
    entries = json.loads(text[8 : 8 + length])
    change(entries)
    packed = json.dumps(entries).encode()
    return struct.pack("<Q", len(packed)) + packed + text[8 + length :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: struct.pack("<Q", 2**60) + text[8:], "the safetensors header claims 1152921504606846976 bytes"),
        (lambda text: text[:4], "the safetensors header claims -1 bytes of 4"),
        (lambda text: text[:-4], "the tensors take"),
        (lambda text: text + b"    ", "the tensors take"),
        (lambda text: header(text, lambda entries: entries["scale"].update(data_offsets=[0, 4])), "claims the bytes"),
        (lambda text: header(text, lambda entries: entries["scale"].update(shape=[2])), r"scale is I32 \[2\]"),
        (lambda text: header(text, lambda entries: entries.pop("scale")), "the names in the safetensors header"),
    ],
)
def test_forged_weights_are_refused(saved, change, message):
    tamper(saved, "weights.safetensors", change)
    with pytest.raises(InvalidFile, match=message) as caught:
        read_archive(saved)
    assert str(caught.value).startswith(f"{saved}: weights.safetensors: ")


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/passwd", "graphs/../x.json", "C:\\x", "data.pkl", "graphs/a b.json"]
)
def test_unexpected_members_are_refused(saved, name):
    with zipfile.ZipFile(saved, "a") as file:
        file.writestr(name, b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InvalidFile) as caught:
        read_archive(saved)
    assert str(caught.value) == f"{saved}: unexpected member {name!r}"


def test_a_member_that_the_manifest_does_not_list_is_refused(saved):
    with zipfile.ZipFile(saved, "a") as file:
        file.writestr("documents/more.json", b"{}")
    with pytest.raises(InvalidFile, match=r"does not list the members \['documents/more.json'\]"):
        read_archive(saved)


def test_members_that_are_there_twice_are_refused(saved):
    with zipfile.ZipFile(saved, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("manifest.json", b"{}")
    with pytest.raises(InvalidFile, match=r"manifest.json is there twice"):
        read_archive(saved)


def test_bombs_and_compressed_weights_are_refused(saved):
    with zipfile.ZipFile(saved, "a") as file:
        file.writestr("documents/bomb.json", b" " * (8 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidFile, match=r"documents/bomb.json unpacks to 8388608 bytes"):
        read_archive(saved)
    with zipfile.ZipFile(saved, "w") as file:
        file.writestr("weights.safetensors", b"", zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidFile, match=r"weights.safetensors is compressed by method 8"):
        read_archive(saved)


def patch(path: Path, member: str, local: tuple[int, str, int] | None, central: tuple[int, str, int] | None) -> None:
    """Overwrite a field of a member's local header and of its entry in the directory: (offset, format, value)."""
    data = bytearray(path.read_bytes())
    for field, start in ((local, data.find(b"PK\x03\x04")), (central, data.find(b"PK\x01\x02"))):
        marker = b"PK\x03\x04" if field is local else b"PK\x01\x02"
        name_at = 30 if field is local else 46
        while data[start + name_at :][: len(member)] != member.encode():
            start = data.find(marker, start + 4)
        if field is not None:
            struct.pack_into(field[1], data, start + field[0], field[2])
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("member", "local", "central", "message"),
    [
        ("weights.safetensors", None, (24, "<I", 2**31), "claims 2147483648 bytes"),
        ("weights.safetensors", (26, "<H", 9), None, "the local header is not that of the directory"),
        ("weights.safetensors", (28, "<H", 60000), None, "the file ends before"),
        ("weights.safetensors", None, (42, "<I", 2**30), "outside the file"),
        ("manifest.json", (6, "<H", 1), (8, "<H", 1), "manifest.json is encrypted"),
        ("manifest.json", None, (24, "<I", 2**30), "manifest.json unpacks to 1073741824 bytes"),
        ("manifest.json", None, (16, "<I", 1), "CRC|crc"),
        ("graphs/dense.json", None, (24, "<I", 9), "has 9 bytes, expected"),
    ],
)
def test_lying_zip_headers_are_refused(saved, member, local, central, message):
    patch(saved, member, local, central)
    with pytest.raises(InvalidFile, match=message) as caught:
        read_archive(saved)
    assert str(caught.value).startswith(f"{saved}: ")


def test_truncated_files_are_refused(saved):
    whole = saved.read_bytes()
    for length in (0, 1, 30, 64, 400, len(whole) // 2, len(whole) - 22, len(whole) - 1):
        saved.write_bytes(whole[:length])
        message = "the file is empty" if length == 0 else "not a graphwright archive: it is foreign or truncated"
        with pytest.raises(InvalidFile) as caught:
            read_archive(saved)
        assert str(caught.value) == f"{saved}: {message}"


def test_any_flipped_byte_is_refused_or_changes_only_weights(saved):
    whole = saved.read_bytes()
    expected = [node.name for node in read_archive(saved).phases["dense"].graph.nodes]
    for position in range(0, len(whole), 61):
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            loaded = read_archive(saved)
        except InvalidFile:
            continue
        assert [node.name for node in loaded.phases["dense"].graph.nodes] == expected


@pytest.mark.parametrize("content", [b"hello", b"\x80\x04K\x01.", b"{}"])
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "foreign.gw"
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match=r"foreign.gw: not a graphwright archive"):
        read_archive(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(InvalidFile, match=r"foreign.gw: unexpected member"):
        read_archive(path)
