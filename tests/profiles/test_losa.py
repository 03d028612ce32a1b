"""LoSA on a tiny Llama: zeros, recovery, patterns, resuming, replay, files, and bad input."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import graphwright as gw
from graphwright.errors import GraphwrightError, InvalidArgument, StaleProfile
from graphwright.kernels.bitmask_weights import decompress
from graphwright.profiles import losa as module
from graphwright.profiles.losa import LoSA
from tests.models import CACHE, VOCABULARY, Mlp, captured_llama, tiny_llama
from tests.new_process import assert_replays

# Texts that can be learned: every token follows from the one before.
STEPS = torch.arange(8)[:, None] * 3 + torch.arange(CACHE - 1) * 5
TEXTS = STEPS % VOCABULARY
QUICK = {"steps": 2, "train_steps": 6, "samples": 8, "lr": 2e-2, "compute": "float32"}


def program(**options) -> gw.Program:
    return _program(LoSA(**{**QUICK, **options}).model_dump_json())


@cache
def _program(options: str) -> gw.Program:
    return optimized(LoSA(**json.loads(options)))


def optimized(method: LoSA, texts: torch.Tensor = TEXTS) -> gw.Program:
    return gw.optimize(captured_llama(), methods=[method], calibration=[texts], progress=False)


def kept(of: gw.Program) -> list[gw.Decision]:
    return [d for d in of.decisions if d.status == "kept"]


def weights(of: gw.Program) -> dict[str, torch.Tensor]:
    """Place -> sparse weight, as the profile has them."""
    tensors, found = of.profile.tensors, {}
    for decision in kept(of):
        name = decision.options["weight"]
        columns = int(decision.facts["features"].split(" -> ")[0])
        found[decision.place] = decompress(tensors[f"{name}.bits"], tensors[f"{name}.values"], columns)
    return found


def logits(of: gw.Program) -> torch.Tensor:
    of.reset()
    return of(TEXTS[:1], torch.arange(TEXTS.shape[1]))


def loss(of: gw.Program) -> float:
    total = 0.0
    for text in TEXTS:
        of.reset()
        out = of(text[None], torch.arange(len(text)))[0, :-1]
        total += float(torch.nn.functional.cross_entropy(out, text[1:]))
    return total / len(TEXTS)


def test_every_phase_gets_the_sparse_weights():
    made = program()
    assert len(kept(made)) == 3 * 14
    assert len(weights(made)) == 14
    for phase in made.phases.values():
        called = [str(node.target) for node in phase.exported.graph.nodes if node.op == "call_function"]
        assert called.count("graphwright.bitmask_linear.default") == 14
        assert called.count("aten.linear.default") == 1  # the head
    zeros = torch.cat([weight.flatten() for weight in weights(made).values()]) == 0
    assert float(zeros.float().mean()) == pytest.approx(0.6, abs=0.02)  # rows of 64 and 96 are cut to whole weights


def test_zeros_before_and_after_merging_are_the_same(tmp_path):
    made = optimized(LoSA(**QUICK, folder=tmp_path))
    pruned = module.TrainingFolder(tmp_path, {}).tensors("weights")
    for place, weight in weights(made).items():
        assert torch.equal(weight == 0, pruned[place] == 0)
        assert not torch.equal(weight, pruned[place])  # the adapters did something


def test_training_recovers_and_rates_spread_sparsity():
    alone, trained = program(train_steps=0), program(train_steps=25, steps=1)
    assert loss(trained) < loss(alone) - 0.2
    last = trained.profile.measured["losa"]["steps"][-1]
    assert sorted(last["rates"]) == pytest.approx([0.58, 0.62])
    assert sum(last["ranks"]) == 2 * 6
    alike = last["redundancy"]
    assert (last["rates"][0] <= last["rates"][1]) == (alike[0] <= alike[1])


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_patterns_hold_after_merging(pruner, pattern):
    made = program(pattern=pattern, pruner=pruner, train_steps=2)
    for weight in weights(made).values():
        counts = (weight != 0).view(-1, pattern[1]).sum(1)
        assert int(counts.max()) == pattern[0]
    steps = made.profile.measured["losa"]["steps"]
    assert steps[0]["zeros"] < steps[1]["zeros"] == pytest.approx(0.5, abs=0.01)


def test_the_report_says_what_zeros_are_worth():
    text = " ".join(str(program().report()).split())
    assert "zeros in 14 linears" in text
    assert "Zeros of weights save memory." in text
    assert "step 2: 59.4% zeros" in text


def test_dense_form_gives_the_same_numbers():
    # The compressed product adds up in another order: sums of up to 96 terms, 14 linears deep.
    compressed, dense = program(), program(form="dense")
    torch.testing.assert_close(logits(compressed), logits(dense), rtol=0, atol=1e-3)
    assert compressed.weight_bytes() < dense.weight_bytes()


def test_an_unmasked_adapter_keeps_the_sparsity_only_by_force():
    made = program(masked=False, steps=1)
    zeros = torch.cat([weight.flatten() for weight in weights(made).values()]) == 0
    assert float(zeros.float().mean()) == pytest.approx(0.6, abs=0.02)


def test_comparisons():
    rates = {
        kind: program(rates=kind, train_steps=0).profile.measured["losa"]["steps"][-1]["rates"]
        for kind in ("similarity", "uniform", "reversed")
    }
    assert rates["uniform"] == [0.6, 0.6]
    assert sorted(rates["reversed"]) == sorted(rates["similarity"]) == pytest.approx([0.58, 0.62])
    assert program(ranks="uniform", train_steps=0).profile.measured["losa"]["steps"][-1]["ranks"] == [10, 10]


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    whole = optimized(LoSA(**QUICK))
    method = LoSA(**QUICK, folder=tmp_path, save_every=2)
    real, count = module.TrainingFolder.save, [0]

    def save(self, record, tensors):
        real(self, record, tensors)
        count[0] += 1
        if count[0] in (3, 8):  # in the middle of the first training, and of the second
            raise KeyboardInterrupt

    monkeypatch.setattr(module.TrainingFolder, "save", save)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            optimized(method)
    monkeypatch.setattr(module.TrainingFolder, "save", real)
    made = optimized(method)
    for place, weight in weights(whole).items():
        assert torch.equal(weights(made)[place], weight)
    assert torch.equal(logits(made), logits(whole))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    method = LoSA(**QUICK, folder=tmp_path, save_every=2)
    real, count = module.TrainableProgram.loss, [0]

    def loss(self, flat):
        count[0] += 1
        return real(self, flat) * (float("inf") if count[0] == 4 else 1)

    monkeypatch.setattr(module.TrainableProgram, "loss", loss)
    with pytest.raises(InvalidArgument, match=r"loss of step 4 is not finite .*the state after 2 updates is in"):
        optimized(method)
    assert module.TrainingFolder(tmp_path, {}).record["updates"] == 2
    assert kept(optimized(method))  # goes on from there


def test_a_profile_replays_bit_equal_in_a_new_process_and_the_file_is_small(tmp_path):
    made = program()
    assert_replays(made, logits(made), "tests.profiles.test_losa", tmp_path)
    stored = sum(t.nbytes for name, t in made.profile.tensors.items() if name.startswith("losa."))
    dense = sum(weight.nbytes for weight in weights(made).values())
    assert stored <= 0.5 * dense


def test_a_profile_or_a_folder_for_other_weights_is_refused(tmp_path):
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    captured = gw.capture_causal_lm(other, CACHE)
    with pytest.raises(StaleProfile, match="weights"):
        gw.optimize(captured, profile=program().profile, progress=False)
    method = LoSA(**{**QUICK, "train_steps": 0}, folder=tmp_path)
    optimized(method)
    with pytest.raises(StaleProfile, match="holds a training of other weights"):
        gw.optimize(captured, methods=[method], calibration=[TEXTS], progress=False)


def test_forged_weights_in_a_profile_fail_at_their_site():
    profile = program().profile.model_copy(deep=True)
    name = next(name for name in profile.tensors if name.endswith(".starts"))
    profile.tensors[name] = profile.tensors[name] + 10**6
    made = gw.optimize(captured_llama(), profile=profile, progress=False)
    failed = [d.reason for d in made.decisions if d.status == "failed"]
    assert len(failed) == 3
    assert all("do not count the same" in reason for reason in failed)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"pattern": (5, 4)}, "got n=5 of m=4, expected 1 to 4"),
        ({"pruner": "magnitude"}, "pruner"),
        ({"samples": 1}, "samples"),
    ],
)
def test_wrong_options_are_refused_by_name(options, reason):
    with pytest.raises(GraphwrightError, match=reason):
        LoSA(**options)


def test_a_pattern_that_does_not_divide_is_a_refusal_at_the_site():
    made = program(pattern=(16, 48), train_steps=0)
    reasons = {d.facts["role"]: d.reason for d in made.decisions}
    assert reasons["q"] == "blocks of 48 do not divide 64 channels"
    assert reasons["down"] == ""


@pytest.mark.parametrize("texts", [TEXTS[:3], TEXTS[:, :9]])
def test_texts_that_are_too_few_or_too_short_are_refused(texts):
    with pytest.raises(InvalidArgument, match="at least 4 texts of one length and 128 tokens"):
        optimized(LoSA(**QUICK), texts)


def test_a_linear_is_not_quantized_and_pruned_at_once():
    with pytest.raises(InvalidArgument, match="int8 and losa would both rewrite"):
        gw.optimize(
            captured_llama(),
            methods=[gw.Int8(smooth=None), LoSA(**{**QUICK, "train_steps": 0})],
            calibration=[TEXTS],
            progress=False,
        )


def test_a_program_without_layers_is_refused():
    with pytest.raises(InvalidArgument, match=r"role down|expected a norm"):
        gw.optimize(Mlp().eval(), (torch.randn(8, 32),), methods=[LoSA(**QUICK)], progress=False)
