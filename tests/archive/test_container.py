"""The archive: what is written comes back the same, and nothing that was not written is accepted."""

from __future__ import annotations

import io
import os
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphwright.archive import signature as archive_signature
from graphwright.archive import tensors as archive_tensors
from graphwright.archive.container import Contents, read_archive, write_archive
from graphwright.errors import InvalidFile


@torch.library.custom_op("graphwright::archive_test_double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options
) -> ExportedProgram:
    return torch.export.export(module, args, kwargs, strict=False, **options).run_decompositions({})


def round_trip(tmp_path: Path, **phases: ExportedProgram) -> dict[str, ExportedProgram]:
    write_archive(tmp_path / "program.gw", Contents(phases))
    return read_archive(tmp_path / "program.gw").phases


def described(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """All that a graph says, as values that compare: fake tensors by their text, which holds their symbolic sizes."""
    metadata = ("stack_trace", "nn_module_stack", "torch_fn", "graphwright", "unbacked_bindings")
    return [
        (
            *(node.name, node.op, str(node.target), str(node.args), str(node.kwargs)),
            *(str(node.meta.get("val")), strides(node.meta.get("val"))),
            *(str(node.meta.get(name)) for name in metadata),
        )
        for node in program.graph.nodes
    ]


def strides(value: Any) -> str:
    if isinstance(value, list | tuple):
        return str([strides(item) for item in value])
    return f"{value.stride()} {value.device} {value.requires_grad}" if isinstance(value, Tensor) else ""


def assert_same(loaded: ExportedProgram, program: ExportedProgram) -> None:
    loaded.validate()
    assert described(loaded) == described(program)
    assert loaded.range_constraints == program.range_constraints
    assert loaded.graph_signature == program.graph_signature
    assert loaded.verifiers == program.verifiers
    assert loaded.call_spec == program.call_spec
    assert [entry.fqn for entry in loaded.module_call_graph] == [entry.fqn for entry in program.module_call_graph]


class Block(nn.Module):
    """Two linears with one weight, a convolution kept in another memory order, and a mask with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.conv = nn.Conv2d(2, 3, 3, padding=1).to(memory_format=torch.channels_last)
        self.register_buffer("scale", torch.tensor(3, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor, *, picture: Tensor) -> dict[str, Any]:
        mask = torch.full((x.shape[0], x.shape[0]), -torch.inf).triu(1)
        scores = torch.softmax(self.first(x) @ self.second(x).t() + mask, -1)
        values, _ = torch.topk(scores, 2)
        same = picture.to(torch.float64).to(torch.float32, memory_format=torch.contiguous_format)
        return {"values": [values, x.shape[0]], "picture": (self.conv(same).clamp(max=float("inf")) * self.scale,)}


@pytest.fixture(scope="module")
def block() -> ExportedProgram:
    torch.manual_seed(0)
    shapes = {"x": {0: Dim("rows", min=2, max=64)}, "picture": {2: Dim("height", min=3, max=40)}}
    program = export(Block(), (torch.randn(5, 8),), {"picture": torch.randn(1, 2, 8, 4)}, dynamic_shapes=shapes)
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    node.meta["graphwright"] = {"pass": "quantize_linear", "site": "dense/first/0", "error": 0.25}
    return program


@pytest.fixture
def saved(block, tmp_path) -> Path:
    write_archive(tmp_path / "block.gw", Contents({"dense": block}, {"profile": {"bits": 4}}))
    return tmp_path / "block.gw"


def test_graph_signature_and_metadata_come_back(block, tmp_path):
    loaded = round_trip(tmp_path, dense=block)["dense"]
    assert_same(loaded, block)
    assert loaded.state_dict["first.weight"] is loaded.state_dict["second.weight"]
    assert isinstance(loaded.state_dict["first.weight"], nn.Parameter)
    assert loaded.state_dict["conv.weight"].stride() == block.state_dict["conv.weight"].stride()
    for rows, height in ((2, 3), (5, 8), (64, 40)):
        x, picture = torch.randn(rows, 8), torch.randn(1, 2, height, 4)
        expected, got = block.module()(x, picture=picture), loaded.module()(x, picture=picture)
        for one, other in zip(*map(pytree.tree_leaves, (expected, got)), strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    with pytest.raises((RuntimeError, AssertionError), match="64"):
        loaded.module()(torch.randn(65, 8), picture=torch.randn(1, 2, 8, 4))


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    write_archive(tmp_path / "again.gw", read_archive(saved))
    assert (tmp_path / "again.gw").read_bytes() == saved.read_bytes()


def test_a_loaded_program_can_be_decomposed_and_exported_again(saved):
    loaded = read_archive(saved).phases["dense"]
    x, picture = torch.randn(7, 8), torch.randn(1, 2, 6, 4)
    expected = loaded.module()(x, picture=picture)["values"][0]
    core = loaded.run_decompositions()
    torch.testing.assert_close(core.module()(x, picture=picture)["values"][0], expected)
    again = export(loaded.module(), (x,), {"picture": picture})
    assert torch.equal(again.module()(x, picture=picture)["values"][0], expected)


class Cache(nn.Module):
    """Tied weights and a cache that both phases write."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.zeros(64, 1024))
        self.register_buffer("length", torch.tensor(7))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        self.cache[:, :8] += hidden.sum(0)
        self.length += tokens.shape[0]
        return self.head(hidden + self.cache[0, :8]) * self.length


def test_phases_share_weights_and_state(tmp_path):
    model = Cache()
    prefill = export(model, (torch.arange(5),), dynamic_shapes=({0: Dim("tokens", min=2, max=32)},))
    decode = export(model, (torch.arange(1),))
    loaded = round_trip(tmp_path, prefill=prefill, decode=decode)
    assert_same(loaded["prefill"], prefill)
    assert_same(loaded["decode"], decode)
    names = ("embed.weight", "head.weight", "cache", "length")
    for name in names:
        assert loaded["prefill"].state_dict[name] is loaded["decode"].state_dict[name]
    assert loaded["decode"].state_dict["head.weight"] is loaded["prefill"].state_dict["embed.weight"]
    with zipfile.ZipFile(tmp_path / "program.gw") as file:
        assert file.getinfo("weights.safetensors").file_size < 1024, "the empty cache was stored"
    for tokens in (torch.arange(6), torch.tensor([3]), torch.tensor([9])):
        phase = "prefill" if len(tokens) > 1 else "decode"
        expected = {"prefill": prefill, "decode": decode}[phase].module()(tokens)
        assert torch.equal(loaded[phase].module()(tokens), expected)


def test_state_is_stored_as_it_is_now(tmp_path):
    program = export(Cache(), (torch.arange(3),))
    program.module()(torch.arange(3))
    loaded = round_trip(tmp_path, decode=program)["decode"]
    assert torch.equal(loaded.state_dict["cache"], program.state_dict["cache"])
    assert loaded.state_dict["cache"].count_nonzero()


def test_one_name_may_mean_another_tensor_in_another_phase(tmp_path):
    phases = {name: export(nn.Linear(4, 4), (torch.randn(1, 4),)) for name in ("dense", "sparse")}
    loaded = round_trip(tmp_path, **phases)
    for name, program in phases.items():
        assert torch.equal(loaded[name].state_dict["weight"], program.state_dict["weight"])


def test_unbacked_sizes_and_custom_operators(tmp_path):
    class Select(nn.Module):
        def forward(self, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor, None]:
            length = count.item()
            torch._check(length >= 1)
            torch._check(length <= 9)
            kept = x[x > 0]
            return double(kept).sum() * length, torch.ones(length) + float("nan"), None

    program = export(Select(), (torch.randn(9), torch.tensor(4)))
    loaded = round_trip(tmp_path, only=program)["only"]
    assert_same(loaded, program)
    x = torch.randn(9)
    expected, got = program.module()(x, torch.tensor(7)), loaded.module()(x, torch.tensor(7))
    assert torch.equal(got[0], expected[0])
    assert got[1].shape == (7,)
    assert got[1].isnan().all()
    assert got[2] is None
    with pytest.raises(RuntimeError):
        loaded.module()(x, torch.tensor(11))


def test_derived_sizes_keep_their_ranges(tmp_path):
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.repeat(2) + y

    size = Dim("size", min=2, max=8)
    program = export(Pair(), (torch.randn(3), torch.randn(6)), dynamic_shapes=({0: size}, {0: 2 * size}))
    loaded = round_trip(tmp_path, only=program)["only"]
    assert_same(loaded, program)
    assert torch.equal(loaded.module()(torch.ones(4), torch.ones(8)), torch.full((8,), 2.0))


def test_every_kind_of_literal(tmp_path):
    class Literals(nn.Module):
        def forward(self, x: Tensor, flag: bool, text: str, number: float) -> list[Tensor]:
            full = torch.full((2,), float("nan"), dtype=torch.bfloat16, device="cpu", layout=torch.strided)
            turned = torch.complex(x, x) * (1 + 2j)
            exact = nn.functional.gelu(x, approximate="tanh") if text == "tanh" else x
            parts = torch.split(x, [1, 2])
            return [
                full.to(torch.float16),
                turned,
                exact.clone(memory_format=torch.contiguous_format),
                parts[1] * number,
            ]

    program = export(Literals(), (torch.randn(3, 2), True, "tanh", 0.5))
    loaded = round_trip(tmp_path, only=program)["only"]
    assert_same(loaded, program)
    x = torch.randn(3, 2)
    expected, got = (phase.module()(x, True, "tanh", 0.5) for phase in (program, loaded))
    assert got[0].isnan().all()
    assert all(map(torch.equal, expected[1:], got[1:]))


@pytest.fixture(scope="module")
def llama() -> ExportedProgram:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    shapes = {"input_ids": {1: Dim("sequence", min=2, max=64)}}
    return export(model, (), {"input_ids": torch.randint(0, 99, (1, 8))}, dynamic_shapes=shapes)


def test_llama_is_bit_equal_and_takes_no_more_than_its_weights(llama, tmp_path):
    loaded = round_trip(tmp_path, prefill=llama, same=llama)["prefill"]
    assert_same(loaded, llama)
    for length in (2, 8, 33, 64):
        tokens = torch.randint(0, 4096, (1, length))
        expected, got = llama.module()(input_ids=tokens), loaded.module()(input_ids=tokens)
        assert type(got) is type(expected), "the model's own result class"
        assert torch.equal(got.logits, expected.logits)
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in (*llama.state_dict.values(), *llama.constants.values())}
    assert (tmp_path / "program.gw").stat().st_size <= 1.05 * sum(weights.values())


def test_a_result_class_that_is_not_there_becomes_a_dict(llama, tmp_path, monkeypatch):
    write_archive(tmp_path / "llama.gw", Contents({"only": llama}))
    monkeypatch.setattr(archive_signature, "_OUTPUT_PACKAGES", ())
    got = read_archive(tmp_path / "llama.gw").phases["only"].module()(input_ids=torch.arange(4)[None])
    assert isinstance(got, dict)
    assert got["logits"].shape == (1, 4, 4096)


def test_weights_are_plain_safetensors(saved, block):
    with zipfile.ZipFile(saved) as file:
        loaded = safetensors.torch.load(file.read("weights.safetensors"))
    assert loaded.keys() == {"first.weight", "first.bias", "conv.weight", "conv.bias", "scale"}
    assert torch.equal(loaded["conv.weight"], block.state_dict["conv.weight"])


def test_what_cannot_be_stored_is_named(tmp_path):
    Pair = namedtuple("Pair", "a b")

    class Named(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Pair(x + 1, x + 2)

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    pytree._register_namedtuple(Pair, serialized_type_name="test_archive.Pair")
    path = tmp_path / "no.gw"
    x = (torch.randn(2),)
    plain = export(nn.Linear(2, 2), x)
    for contents, message in (
        (Contents({"a": export(Named(), x)}), r"no\.gw: phase 'a': a namedtuple among the arguments or results"),
        (Contents({"a": export(Branch(), x)}), r"phase 'a': node .*: .* cannot be stored"),
        (Contents({"../a": plain}), r"'\.\./a' cannot be the name of a member"),
        (Contents({"a": plain}, {"notes": object()}), r"document 'notes': cannot be stored .*not JSON serializable"),
        (Contents({}, {}, {"t": torch.empty(2, device="meta")}), r"tensors/t: a tensor without data"),
        (Contents({}, {}, {"t": torch.eye(2).to_sparse()}), r"tensors/t: a Tensor of layout torch.sparse_coo"),
        (Contents({}, {}, {"t": 3}), r"tensors/t: a int cannot be stored"),  # type: ignore[dict-item]
    ):
        with pytest.raises(InvalidFile, match=message):
            write_archive(path, contents)
    assert list(tmp_path.iterdir()) == []


def test_missing_files_and_directories_are_named(block, tmp_path):
    with pytest.raises(InvalidFile, match=r"none.gw: No such file"):
        read_archive(tmp_path / "none.gw")
    with pytest.raises(InvalidFile, match=r"Is a directory"):
        read_archive(tmp_path)
    with pytest.raises(InvalidFile, match=r"is a directory"):
        write_archive(tmp_path, Contents({"dense": block}))
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "file" / "x.gw", "Not a directory"),
        (tmp_path / "no" / "such" / "folder.gw", "No such file or directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(InvalidFile, match=message) as caught:
            write_archive(path, Contents({"dense": block}))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("broken")])
def test_an_interrupted_save_keeps_the_old_file(block, saved, error, monkeypatch):
    before = saved.read_bytes()

    def interrupt(self: Any, stream: io.RawIOBase) -> None:
        stream.write(b"half")
        raise error

    monkeypatch.setattr(archive_tensors.TensorWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else InvalidFile):
        write_archive(saved, Contents({"other": block}))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_saving_through_a_link_keeps_the_link(block, saved, tmp_path):
    link = tmp_path / "link.gw"
    link.symlink_to(saved.name)
    write_archive(link, Contents({"other": block}))
    assert link.is_symlink()
    assert list(read_archive(saved).phases) == ["other"]
