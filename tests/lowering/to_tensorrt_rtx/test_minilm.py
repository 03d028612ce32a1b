"""A sentence encoder as an engine, batch and length dynamic."""

from __future__ import annotations

from torch.export import Dim

import graphwright as gw
from graphwright.examples.load_minilm import load_minilm
from tests.lowering.to_tensorrt_rtx.build_program import built, count


def test_batch_and_length_stay_dynamic(tmp_path):
    model, tokenizer = load_minilm()
    texts = tokenizer(["A sentence of some words.", "Another."], padding=True, return_tensors="pt")
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=512)}
    example = (texts["input_ids"], texts["attention_mask"])
    program = gw.optimize(model, example, dynamic_shapes=(sizes, sizes), progress=False)
    (phase,) = built(program, tmp_path).values()
    assert count(phase, "attention_input") == 6
    assert phase["sizes"]["input_ids"] == [[1, 2], [2, 8], [64, 512]]
