"""The trained Wan as engines: dense, and with heads that RainFusion tells apart while it runs."""

from __future__ import annotations

import graphwright as gw
from tests.lowering.to_tensorrt_rtx.build_program import built, count
from tests.tiny_wan import captured


def test_dense_and_sparse_phases_are_built(tmp_path):
    program = gw.optimize(captured(), methods=[gw.RainFusion(dense_steps=0.2)], keep="smaller", progress=False)
    phases = built(program, tmp_path)
    assert count(phases["dense"], "attention_input") == 4, "two blocks of self-attention and of cross-attention"
    operators = {name.split("_default")[0] for name in phases["sparse"]["operators"]}
    assert {"band_recall", "block_sparse_attention"} <= operators
