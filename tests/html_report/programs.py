"""Programs whose pages the tests look at."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import graphwright as gw
from tests.models import captured_llama, tokens

HOSTILE = "<img src=x onerror=\"document.title='broken'\"></script><script>document.title='broken'</script>"


@cache
def quantized() -> gw.Program:
    """The tiny Llama with int8 linears, some rolled back for a budget."""
    return gw.optimize(
        captured_llama(),
        methods=[gw.Int8()],
        calibration=[tokens(24)],
        keep="smaller",
        budget=gw.Budget(max_error=0.012, probes=4),
    )


@cache
def canonical() -> gw.Program:
    """Nothing was decided or measured."""
    return gw.optimize(captured_llama())


class Chain(nn.Module):
    """So many calls in one module."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls // 2):
            x = (x + 1).sin()
        return x


def long_program(calls: int) -> gw.Program:
    """A program of one module with very many calls, made without a trace of each, which would take minutes."""
    from torch.export import ExportedProgram

    exported: ExportedProgram = torch.export.export(Chain(8).eval(), (torch.zeros(3),)).run_decompositions({})
    graph = exported.graph
    output = graph.output_node()
    last = output.args[0][0]
    with graph.inserting_before(output):
        for number in range(calls - 8):
            target = (torch.ops.aten.sin.default, torch.ops.aten.cos.default)[number % 2]
            node = graph.call_function(target, (last,))
            node.meta = dict(last.meta)
            last = node
    output.args = ((last,),)
    exported.graph_signature.output_specs[0].arg.name = last.name
    exported.graph_module.recompile()
    from graphwright.passes.manager import PassRecord
    from graphwright.phases import Phase, PhasePlan
    from graphwright.profiles.profile import Fingerprint, Profile
    from graphwright.program import History

    history = History([PassRecord("drop_noops", "main", 0, calls, calls, 0.1, 0.1)])
    profile = Profile(fingerprint=Fingerprint(graph="", weights=""), data="")
    return gw.Program([Phase(PhasePlan(name="main"), exported)], ("x",), "module", {}, profile, history)
