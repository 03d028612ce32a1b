"""The rewritten block: against a hand-written one, bit-equal at full budget, its state, and what its guard refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright.lowering.eager import lower_eager
from graphwright.passes.canonicalize import CANONICALIZERS
from graphwright.passes.copy_exported import copy_exported
from graphwright.passes.decision import Decision
from graphwright.passes.manager import PassManager
from graphwright.passes.rewrite import apply_decisions
from graphwright.patterns.block_site import find_blocks
from graphwright.patterns.graph import GraphView
from graphwright.phases import state_of
from tests.patterns.test_block_site import TOKENS, WIDTH, Block


class Stack(nn.Module):
    """Two blocks between linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Block(), Block()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.out(self.second(self.first(self.into(x))))


def exported(batch=1, dynamic_shapes=None):
    """The canonical program."""
    args = (torch.randn(batch, TOKENS, WIDTH),)
    model = Stack().eval().requires_grad_(False)
    program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes).run_decompositions({})
    PassManager(CANONICALIZERS, check_numbers=False).run(program)
    return program


def rewritten(base, budget, **options):
    """The program of one budget, and its callable."""
    program = copy_exported(base)
    first, second = find_blocks(GraphView(program)).sites
    decisions = [
        Decision(site=s.id, method="test", pass_name="select_tokens",
                 options={"budget": budget, "before": before, "last": s is second, **options})
        for s, before in ((first, ""), (second, first.place))
    ]  # fmt: skip
    rewriting = apply_decisions(program, "main", decisions)
    assert not rewriting.failed, rewriting.failed
    rewriting.commit()
    return program


class Runner:
    """Programs of several budgets over one state."""

    def __init__(self, base, budgets, **options):
        self.programs = {budget: rewritten(base, budget, **options) for budget in budgets}
        self.state = {}
        for program in self.programs.values():
            self.state |= {n: t for n, t in state_of(program).items() if n not in self.state}
        for program in self.programs.values():
            program.state_dict.update({n: t for n, t in self.state.items() if n in program.state_dict})
        self.run = {budget: lower_eager(program) for budget, program in self.programs.items()}

    def __call__(self, budget, x):
        with torch.no_grad():
            return self.run[budget](x)[0]

    def part(self, suffix):
        return [tensor for name, tensor in sorted(self.state.items()) if name.endswith(suffix)]


@pytest.fixture(scope="module")
def base():
    return exported()


def inputs(count, batch=1):
    """A start and small changes of some tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, TOKENS, WIDTH, generator=generator)
    found = [x]
    for _ in range(count - 1):
        moved = torch.rand(batch, TOKENS, 1, generator=generator) < 0.5
        found.append(found[-1] + moved * torch.randn(batch, TOKENS, WIDTH, generator=generator))
    return found


def test_full_budget_is_bit_equal_and_fills_the_state(base):
    runner = Runner(base, [10])
    model = Stack().eval()
    for x in inputs(3):
        with torch.no_grad():
            assert torch.equal(runner(10, x), model(x))
        first = model.first(model.into(x))
        outputs = runner.part(".output")
        assert any(torch.equal(kept, first) for kept in outputs)
        assert all(not skips.any() for skips in runner.part(".skips"))
        (entry,) = runner.part(".input")  # the second block's input is the first one's output
        assert torch.equal(entry, model.into(x))


def test_memory_is_one_tensor_of_tokens_a_block(base):
    runner = Runner(base, [10, 5])
    shapes = sorted(tuple(t.shape) for t in runner.state.values())
    tokens, numbers = (1, TOKENS, WIDTH), (1, TOKENS)
    # Two outputs and the first input; log-sum-exp and skips of both; what the program returned.
    assert shapes == sorted([tokens] * 3 + [numbers] * 4 + [(1, TOKENS, 4)])


def test_no_budget_gives_the_output_of_the_step_before(base):
    runner = Runner(base, [10, 5, 0])
    x, y, z, last = inputs(4)
    before = runner(10, x)
    again = runner(0, y)
    assert torch.equal(again, before)
    assert all((skips == 1).all() for skips in runner.part(".skips"))
    then = runner(5, z)
    held = runner(0, last)
    assert torch.equal(held, then)
    kept = held.clone()
    runner(10, last)
    assert torch.equal(held, kept)  # what was returned is the caller's


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def picked(x, chosen):
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


def by_hand(model, x, budget, state, residual=False, penalty=0.5):
    """The blocks in plain torch, with the same state."""
    hidden = model.into(x)
    for number, block in enumerate((model.first, model.second)):
        old = state[number]
        change = (hidden - old["input"]).square().mean(-1).sqrt()
        signal = old["lse"] * change
        score = signal / signal.abs().mean(-1, keepdim=True) + penalty * old["skips"].clamp(max=10).exp()
        chosen = score.topk(round(budget * TOKENS / 10), 1).indices.sort(1).values
        normed = block.norm1(hidden)
        key, value = heads(block.k(normed)), heads(block.v(normed))
        query = heads(block.q(picked(normed, chosen)))
        scores = query @ key.mT * query.shape[-1] ** -0.5
        attended = picked(hidden, chosen) + block.o((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        made = attended + block.mlp(attended)
        output = hidden + (old["output"] - old["input"]) if residual else old["output"].clone()
        output.scatter_(1, chosen[..., None].expand_as(made), made)
        skips = (old["skips"] + 1).scatter(1, chosen, 0.0)
        lse = old["lse"].scatter(1, chosen, scores.logsumexp(-1).mean(1))
        state[number] = {"input": hidden, "output": output, "lse": lse, "skips": skips}
        hidden = output
    return model.out(hidden)


def filled(model, x):
    state, hidden = [], model.into(x)
    for block in (model.first, model.second):
        normed = block.norm1(hidden)
        query, key = heads(block.q(normed)), heads(block.k(normed))
        lse = (query @ key.mT * query.shape[-1] ** -0.5).logsumexp(-1).mean(1)
        output = block(hidden)
        state.append({"input": hidden, "output": output, "lse": lse, "skips": torch.zeros(lse.shape)})
        hidden = output
    return state


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_steps_are_those_of_a_hand_written_block(batch, residual):
    model, budgets = Stack().eval(), (10, 5, 3, 8)
    runner = Runner(exported(batch), set(budgets), residual=residual)
    steps = inputs(len(budgets), batch)
    with torch.no_grad():
        runner(10, steps[0])
        state = filled(model, steps[0])
        for budget, x in zip(budgets[1:], steps[1:], strict=True):
            expected = by_hand(model, x, budget, state, residual)
            torch.testing.assert_close(runner(budget, x), expected, rtol=1e-4, atol=1e-5)
    for suffix in ("skips", "lse"):
        for got, wanted in zip(runner.part(f".{suffix}"), (s[suffix] for s in state), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_items_of_a_batch_are_kept_apart():
    """Each item of a guidance batch has its own tokens and state: as if it ran alone."""
    both, alone = Runner(exported(2), [10, 4]), [Runner(exported(1), [10, 4]) for _ in range(2)]
    for budget, x in zip((10, 4, 4), inputs(3, 2), strict=True):
        together = both(budget, x)
        for item in range(2):
            expected = alone[item](budget, x[item : item + 1])
            torch.testing.assert_close(together[item : item + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_token_that_waits_long_is_computed(base):
    """Nothing changes but one token, at three tenths: the penalty brings every token in within a few steps."""
    runner = Runner(base, [10, 3])
    (x,) = inputs(1)
    runner(10, x)
    for _ in range(8):
        x = x.clone()
        x[:, 0] += 1.0
        runner(3, x)
        assert all(skips.max() <= 5 for skips in runner.part(".skips"))


def test_ablations_choose_other_tokens_and_keys(base):
    x, y = inputs(2)
    found = {}
    for name, options in {"score": {}, "fixed": {"tokens": "fixed"}, "keys": {"keys": "selected"}}.items():
        runner = Runner(base, [10, 5], **options)
        runner(10, x)
        found[name] = runner(5, y)
        if name == "fixed":
            first, second = runner.part(".skips")
            assert torch.equal(first, second)
            assert torch.equal(first[0].nonzero().flatten(), torch.arange(1, TOKENS, 2))
    assert not torch.allclose(found["score"], found["fixed"])
    assert not torch.allclose(found["score"], found["keys"])


def test_rolling_back_leaves_the_graph_as_it_was(base):
    from graphwright.patterns.text import graph_text

    program = copy_exported(base)
    before = graph_text(program)
    first, _ = find_blocks(GraphView(program)).sites
    decision = Decision(site=first.id, method="test", pass_name="select_tokens", options={"budget": 5})
    rewriting = apply_decisions(program, "main", [decision])
    rewriting.rollback(first.id)
    rewriting.commit()
    assert graph_text(program) == before
    assert state_of(program) == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"budget": 11}, "a budget is 0 to 10 tenths, got 11"),
        ({"budget": -1}, "a budget is 0 to 10 tenths, got -1"),
        ({"budget": 5, "tokens": "random"}, "tokens='random'"),
        ({"budget": 5, "keys": "none"}, "keys='none'"),
        ({"budget": 5, "weights": [1.0]}, "got 1 weights"),
    ],
)
def test_the_guard_says_what_does_not_fit(base, options, reason):
    program = copy_exported(base)
    first, _ = find_blocks(GraphView(program)).sites
    decision = Decision(site=first.id, method="test", pass_name="select_tokens", options=options)
    assert reason in apply_decisions(program, "main", [decision]).failed[first.id]


def test_a_dynamic_batch_is_refused():
    batch = torch.export.Dim("batch", min=1, max=4)
    program = exported(2, ({0: batch},))
    first, _ = find_blocks(GraphView(program)).sites
    decision = Decision(site=first.id, method="test", pass_name="select_tokens", options={"budget": 5})
    assert "batch or tokens are dynamic" in apply_decisions(program, "main", [decision]).failed[first.id]
