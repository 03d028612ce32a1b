"""What a lowering leaves of a program besides what it lowered."""

from __future__ import annotations

import torch
from torch import nn

from graphwright.lowering.apply import apply
from graphwright.passes.copy_exported import copy_exported


class Scaled(nn.Module):
    """A weight, and a tensor that is called like a part of it, as passes call theirs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("factors", torch.rand(4))

    def forward(self, x):
        return self.linear(x * self.factors)


def test_weights_called_like_a_part_of_another_are_renamed():
    x = torch.randn(2, 4)
    program = copy_exported(torch.export.export(Scaled().eval(), (x,)))
    expected = program.module()(x)
    (spec,) = [spec for spec in program.graph_signature.input_specs if spec.target == "factors"]
    spec.target = "linear.weight.factors.mean"
    program.state_dict[spec.target] = program.state_dict.pop("factors")
    lowered = apply(program, [])
    assert set(lowered.state_dict) == {"linear.weight", "linear.bias", "linear.weight_factors_mean"}
    assert torch.equal(lowered.run_decompositions({}).module()(x), expected)
