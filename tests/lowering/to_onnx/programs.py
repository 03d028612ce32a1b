"""Real models cut to two layers, exported, and compared phase by phase with the program in PyTorch."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

import graphwright as gw
from graphwright.examples.load_smollm2 import load_smollm2
from graphwright.kernels.contract import OPERATORS
from graphwright.lowering.to_onnx.program import OnnxProgram
from graphwright.passes.copy_exported import copy_exported
from graphwright.phases import Phase

CACHE = 96
PROMPT = torch.tensor([[504, 3575, 282, 4649, 314, 260, 905, 4052, 2683, 28, 284, 260, 1131, 314, 2179, 30]])
"""16 tokens of English text."""


def smollm2(methods: tuple[Any, ...] = ()) -> gw.Program:
    """The first two layers of SmolLM2."""
    captured = gw.capture_causal_lm(load_smollm2(layers=2), CACHE)
    return gw.optimize(captured, methods=methods, keep="smaller", progress=False)


def chained(run: gw.Program | OnnxProgram) -> Tensor:
    """Logits of a prefill of 8 tokens, an extension by 5, and 3 steps: each reads what the one before it wrote."""
    run.reset()
    ends = (0, 8, 13, 14, 15, 16)
    pieces = [run(PROMPT[:, a:b], torch.arange(a, b)) for a, b in itertools.pairwise(ends)]
    return torch.cat(pieces, 1)


def greedy(run: gw.Program | OnnxProgram, count: int) -> list[int]:
    """The most probable tokens after the prompt."""
    run.reset()
    logits, found = run(PROMPT, torch.arange(16)), []
    for position in range(16, 16 + count):
        found.append(int(logits[0, -1].argmax()))
        logits = run(torch.tensor([found[-1:]]), torch.tensor([position]))
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest error over the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def node_types(path: Path) -> Counter[str]:
    """How often each operator stands in a model."""
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def by_reference(program: gw.Program, operator: str) -> gw.Program:
    """The same program with an operator's float32 formula in the place of its kernel, which may round further."""
    known, phases = OPERATORS[operator], []
    for phase in program.phases.values():
        phases.append(Phase(phase.plan, copy_exported(phase.exported)))
        for node in phases[-1].exported.graph.nodes:
            if node.target is known.overload:
                node.target = known.reference
    return gw.Program(phases, program.inputs, program.kind, program.facts, program.profile)


def assert_exported(
    program: gw.Program,
    ops: str,
    nodes: dict[str, int],
    tolerance: float,
    folder: Path,
    exact: gw.Program | None = None,
) -> None:
    """Assert that every phase has these nodes, that logits are those of `exact`, and greedy tokens and the size too."""
    path, exact = folder / "model.onnx", exact or program
    program.export(path, ops=ops)
    for file in folder.glob("*.onnx"):
        assert nodes.items() <= node_types(file).items()
    opened = gw.load(path)
    assert relative(chained(opened), chained(exact)) < tolerance
    if tolerance < 1e-3:
        assert greedy(opened, 8) == greedy(exact, 8)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 1.02 * program.weight_bytes()
