"""Adapters and the program that trains them: gradients, checkpointing, merging, training, interruption."""

from __future__ import annotations

import copy

import pytest
import torch

from graphwright.errors import InvalidArgument, InvalidFile, MissingExtra, StaleProfile
from graphwright.passes.dialects import run_functional
from graphwright.patterns.graph import GraphView
from graphwright.prepare import prepare
from graphwright.profiles.layer_rates import LARGEST_RANK
from graphwright.profiles.prune_layers import find_layers
from graphwright.profiles.train_adapters import Trained, Training, order, train_adapters
from graphwright.profiles.trainable_program import SCALE, Adapter, TrainableProgram
from graphwright.profiles.training_folder import TrainingFolder
from tests.models import CACHE, VOCABULARY, captured_llama

TEXTS = torch.randint(0, VOCABULARY, (6, CACHE), generator=torch.Generator().manual_seed(7))
CALLS = [[text[None].contiguous(), torch.arange(CACHE)] for text in TEXTS]


@pytest.fixture(scope="module")
def prefill():
    prepared = prepare(captured_llama())
    exported = prepared.exported["prefill"]
    return exported, find_layers(GraphView(exported), prepared.sites["prefill"].linear)


def made(prefill, *, zeros: float = 0.5, rank: int = 4, checkpoints: bool = False, dtype=torch.float32, moved=True):
    """A program with half of its weights gone, and adapters that do something."""
    exported, layers = prefill
    generator = torch.Generator().manual_seed(0)
    adapters = {}
    for layer in layers:
        for site in layer.sites:
            weight = GraphView(exported).tensor(site.weight).detach().clone()
            weight[torch.rand(weight.shape, generator=generator) < zeros] = 0
            adapters[site.node] = Adapter.fresh(weight, generator)
            adapters[site.node].rank = rank
            if moved:
                with torch.no_grad():
                    adapters[site.node].b.normal_(std=0.02, generator=generator)
    cuts = [layer.output for layer in layers] if checkpoints else []
    return TrainableProgram(exported, adapters, cuts, dtype), adapters


def gradients(program, adapters) -> list[torch.Tensor]:
    for adapter in adapters.values():
        adapter.a.grad = adapter.b.grad = None
    program.loss(CALLS[0]).backward()
    return [part.grad.clone() for adapter in adapters.values() for part in (adapter.a, adapter.b)]


def test_logits_are_those_of_the_program_with_merged_weights(prefill):
    exported, _ = prefill
    program, adapters = made(prefill)
    merged = copy.copy(exported)
    stored = dict(exported.state_dict)
    for node, adapter in adapters.items():
        stored[GraphView(exported).target(node.args[1])] = adapter.merged()
    merged._state_dict = stored
    with torch.no_grad():
        got = program.logits(CALLS[0])
    torch.testing.assert_close(got, run_functional(merged, CALLS[0])[-1])


def test_gradients_are_those_of_finite_differences(prefill):
    program, adapters = made(prefill)
    found = gradients(program, adapters)
    parts = [part for adapter in adapters.values() for part in (adapter.a, adapter.b)]
    for number in (0, 3, 9, 26):
        part, grad = parts[number], found[number]
        place = int(grad.abs().argmax())
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                part.view(-1)[place] += step
                losses.append(float(program.loss(CALLS[0])))
                part.view(-1)[place] -= step
        # Second differences of the loss, and float32 losses of about 5 that are 2e-7 apart at best.
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(grad.view(-1)[place]), rel=0.05, abs=1e-4)


def test_checkpoints_change_nothing(prefill):
    for a, b in zip(gradients(*made(prefill)), gradients(*made(prefill, checkpoints=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_inactive_ranks_get_no_gradient_and_bfloat16_is_close(prefill):
    exact = gradients(*made(prefill, rank=3))
    assert all((grad[3:] == 0).all() if grad.shape[0] == LARGEST_RANK else (grad[:, 3:] == 0).all() for grad in exact)
    rough = gradients(*made(prefill, rank=3, dtype=torch.bfloat16))
    off = sum(float((a - b).square().sum()) for a, b in zip(exact, rough, strict=True)) ** 0.5
    # Each product is rounded to 8 bits, a dozen of them one behind the other.
    assert off <= 12 * 2**-7 * sum(float(a.square().sum()) for a in exact) ** 0.5


# ---- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_every_zero_and_only_those(dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 30, generator=generator).to(dtype)
    weight[torch.rand(40, 30, generator=generator) < 0.6] = 0
    adapter = Adapter.fresh(weight, generator)
    adapter.rank = 8
    with torch.no_grad():
        adapter.b.normal_(generator=generator)
    merged = adapter.merged()
    assert torch.equal(merged == 0, weight == 0)
    update = SCALE * adapter.b[:, :8] @ adapter.a[:8]
    torch.testing.assert_close(merged[weight != 0].float(), (weight.float() + update)[weight != 0], rtol=2**-7, atol=0)
    unmasked = Adapter(weight, adapter.a, adapter.b, 8, masked=False)
    assert (unmasked.merged() == 0).sum() < 0.01 * weight.numel()  # what merging does without the mask


def test_an_update_that_cancels_a_weight_leaves_the_mask_alone():
    weight = torch.tensor([[1.0, 0.0]])
    adapter = Adapter(weight, torch.ones(LARGEST_RANK, 2), torch.zeros(1, LARGEST_RANK), 1)
    adapter.b[0, 0] = -1 / SCALE
    assert torch.equal(adapter.merged() == 0, weight == 0)


def test_unmerging_is_the_inverse():
    generator = torch.Generator().manual_seed(2)
    adapter = Adapter.fresh(torch.randn(8, 12, generator=generator), generator)
    with torch.no_grad():
        adapter.b.normal_(generator=generator)
    wanted = adapter.merged() * (torch.rand(8, 12, generator=generator) < 0.5)
    held = Adapter(adapter.unmerged(wanted), adapter.a, adapter.b, adapter.rank)
    torch.testing.assert_close(held.merged(), wanted)
    assert torch.equal(held.merged() == 0, wanted == 0)


def test_adapters_on_a_quantized_weight_are_refused():
    with pytest.raises(InvalidArgument, match="adapters are trained before weights are quantized"):
        Adapter.fresh(torch.ones(4, 4, dtype=torch.int8), torch.Generator())


# ---- training


def test_the_loss_falls(prefill):
    program, adapters = made(prefill, moved=False)
    notes = []
    done = train_adapters(program, list(adapters.values()), CALLS, Training(24, lr=1e-2, clip=1.0), None, notes.append)
    assert done.step == 24
    assert sum(done.losses[-6:]) < sum(done.losses[:6]) - 0.3
    assert notes[-1].startswith("loss ")
    assert "perplexity" in notes[-1]


def test_an_interrupted_training_ends_where_the_whole_one_does(prefill, tmp_path):
    training = Training(8, batch=2, lr=1e-2)
    program, adapters = made(prefill, moved=False)
    whole = train_adapters(program, list(adapters.values()), CALLS, training)
    again, others = made(prefill, moved=False)

    class Stop(Exception):
        pass

    saved = []

    def save(state: Trained) -> None:
        saved.append(([(a.a.detach().clone(), a.b.detach().clone()) for a in others.values()], copy.deepcopy(state)))
        raise Stop

    with pytest.raises(Stop):
        train_adapters(again, list(others.values()), CALLS, training, save=save, every=3)
    ((parts, state),) = saved
    fresh, third = made(prefill, moved=False)
    with torch.no_grad():
        for adapter, (a, b) in zip(third.values(), parts, strict=True):
            adapter.a.copy_(a)
            adapter.b.copy_(b)
    assert state.step == 3
    done = train_adapters(fresh, list(third.values()), CALLS, training, state)
    assert done.losses == whole.losses
    for one, other in zip(adapters.values(), third.values(), strict=True):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(prefill):
    program, adapters = made(prefill, moved=False)
    count, real = [0], program.loss

    def loss(flat):
        count[0] += 1
        return real(flat) * (float("nan") if count[0] == 6 else 1)

    program.loss = loss
    good = []
    done = train_adapters(
        program,
        list(adapters.values()),
        CALLS,
        Training(9, lr=1e-2),
        save=lambda state: good.append([adapter.b.detach().clone() for adapter in adapters.values()]),
        every=2,
    )
    assert "the loss of step 6 is not finite" in done.stopped
    assert done.step == len(done.losses) == 4
    assert all(torch.equal(a.b, b) for a, b in zip(adapters.values(), good[-1], strict=True))


def test_rates_rise_and_fall():
    training = Training(10, lr=1.0, warmup=0.3)
    rates = [training.rate(step) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[3:] == pytest.approx([7 / 7, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


def test_every_text_comes_once_a_round():
    training = Training(6, batch=2, seed=3)
    rounds = [order(4, training, step) for step in range(4)]
    assert sorted(rounds[0] + rounds[1]) == sorted(rounds[2] + rounds[3]) == [0, 1, 2, 3]
    assert rounds[0] + rounds[1] != rounds[2] + rounds[3]


def test_no_texts_and_no_bitsandbytes(prefill, monkeypatch):
    program, adapters = made(prefill)
    with pytest.raises(InvalidArgument, match="no texts to train on"):
        train_adapters(program, list(adapters.values()), [], Training(1))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtra, match="pip install bitsandbytes"):
        train_adapters(program, list(adapters.values()), CALLS, Training(1, optimizer="adamw8bit"))


# ---- the folder


def test_the_folder_keeps_the_last_state(tmp_path):
    folder = TrainingFolder(tmp_path / "run", {"weights": "w", "texts": "t"})
    assert not folder.record
    folder.save({"step": 1}, {"weights": {"x": torch.ones(2)}, "training": {"y": torch.zeros(1)}})
    folder.save({"step": 2}, {"training": {"y": torch.ones(1)}})
    again = TrainingFolder(tmp_path / "run", {"weights": "w", "texts": "t"})
    assert again.record["step"] == 2
    assert again.tensors("weights")["x"].tolist() == [1, 1]
    assert again.tensors("training")["y"].tolist() == [1]
    assert len(list((tmp_path / "run").iterdir())) == 3  # files of earlier states are gone


def test_another_training_or_a_damaged_folder_is_refused(tmp_path):
    TrainingFolder(tmp_path, {"weights": "w", "texts": "t"}).save({"step": 1}, {"weights": {"x": torch.ones(2)}})
    with pytest.raises(StaleProfile, match="holds a training of other texts"):
        TrainingFolder(tmp_path, {"weights": "w", "texts": "other"})
    folder = TrainingFolder(tmp_path, {"weights": "w", "texts": "t"})
    (tmp_path / folder.record["files"]["weights"]).write_bytes(b"no")
    with pytest.raises(InvalidFile, match="cannot be read"):
        folder.tensors("weights")
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(InvalidFile, match="not the record of a training"):
        TrainingFolder(tmp_path, {"weights": "w", "texts": "t"})


def test_nothing_is_kept_without_a_folder():
    TrainingFolder(None, {}).save({"step": 1}, {"weights": {"x": torch.ones(2)}})
