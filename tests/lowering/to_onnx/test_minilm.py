"""A sentence encoder, batch and length dynamic, in ONNX Runtime."""

from __future__ import annotations

import onnx
import torch
from torch.export import Dim

import graphwright as gw
from graphwright.examples.load_minilm import load_minilm
from tests.lowering.to_onnx.programs import node_types, relative


def test_embeddings_are_the_same_at_every_size(tmp_path):
    model, tokenizer = load_minilm()
    texts = tokenizer(["A sentence of some words.", "Another."], padding=True, return_tensors="pt")
    example = (texts["input_ids"], texts["attention_mask"])
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=512)}
    program = gw.optimize(model, example, dynamic_shapes=(sizes, sizes), progress=False)
    path = tmp_path / "minilm.onnx"
    files = program.export(path, opset=24)
    assert [file.name for file in files] == ["minilm.onnx", "minilm.onnx.data"]
    assert node_types(path)["Attention"] == 6
    assert onnx.load(path, load_external_data=False).opset_import[0].version == 24
    opened = gw.load(path)
    for lines in (
        ["One."],
        ["Three sentences of different lengths.", "Two", "A third one, which is the longest of them all."],
    ):
        made = tokenizer(lines, padding=True, return_tensors="pt")
        wanted = program(made["input_ids"], made["attention_mask"])
        # Float32 sums of up to 1536 terms, in six layers.
        assert relative(opened(made["input_ids"], attention_mask=made["attention_mask"]), wanted) < 1e-5
    assert torch.is_tensor(wanted)
    assert sum(file.stat().st_size for file in files) <= 1.02 * program.weight_bytes()
