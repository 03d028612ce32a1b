"""DartQuant on a tiny Llama: what it decides, replay, what the rotations do, and what it says to bad input."""

from __future__ import annotations

import importlib
import json
from functools import cache

import pytest
import torch

import graphwright as gw
from graphwright.errors import GraphwrightError, InvalidArgument, InvalidFile
from graphwright.kernels.hadamard import matrix
from graphwright.kernels.int4_weights import dequantized, quantize_groups
from graphwright.passes.dialects import run_functional
from graphwright.profiles.dartquant import DartQuant
from graphwright.profiles.gptq import gptq
from graphwright.profiles.measure import SiteMeasure
from graphwright.profiles.whip import fit_rotation, random_hadamard, rounding_error, whip
from tests.models import CACHE, VOCABULARY, Mlp, captured_llama, tokens
from tests.new_process import assert_replays

TEXTS = torch.randint(0, VOCABULARY, (8, CACHE - 1), generator=torch.Generator().manual_seed(5))
QUICK = {"steps": 3, "samples": 128, "batch": 128}


def program(**options) -> gw.Program:
    return _program(DartQuant(**{**QUICK, **options}).model_dump_json())


@cache
def _program(options: str) -> gw.Program:
    method = DartQuant(**json.loads(options))
    return gw.optimize(captured_llama(), methods=[method], calibration=[TEXTS], keep="smaller", progress=False)


def logits(of: gw.Program) -> torch.Tensor:
    of.reset()
    return of(TEXTS[:1], torch.arange(TEXTS.shape[1]))


def kept(of: gw.Program, pass_name: str) -> list[gw.Decision]:
    return [d for d in of.decisions if d.pass_name == pass_name and d.status == "kept"]


def test_everything_at_four_bits():
    made = program(rotate="always", kv_bits=4)
    phases = 3
    assert len(kept(made, "rotate")) == phases
    assert len(kept(made, "rotate_heads")) == 2 * phases
    assert len(kept(made, "quantize_linear_int4")) == 14 * phases
    assert len(kept(made, "fake_quantize_cache")) == 2 * phases
    down = [d for d in kept(made, "quantize_linear_int4") if d.facts["role"] == "down"]
    assert all(d.options["hadamard"] and d.facts["online rotation"] == "H8 x H12" for d in down)
    heads = [d for d in made.decisions if d.facts.get("role") == "head"]
    assert {d.reason for d in heads} == {"role head is not asked for"}
    assert logits(made).isfinite().all()


def test_prefill_and_decode_agree():
    """One program, two phases: the decode steps must continue what the prefill wrote, rotated and rounded alike."""
    made = program(rotate="always", kv_bits=8, activation_bits=8, weights="rtn")
    whole = logits(made)
    made.reset()
    made(TEXTS[:1, :-1], torch.arange(TEXTS.shape[1] - 1))
    last = made(TEXTS[:1, -1:], torch.tensor([TEXTS.shape[1] - 1]))
    # Few tokens round their sums to bfloat16 (2^-9 each, 14 linears deep), and 8 bits may round another way.
    assert (last[:, -1] - whole[:, -1]).norm() <= 0.03 * whole[:, -1].norm()


def test_eight_bits_are_closer_than_four():
    exact = logits(gw.optimize(captured_llama(), progress=False))

    def error(**options) -> float:
        return float((logits(program(rotate="always", weights="rtn", **options)) - exact).norm() / exact.norm())

    by_width = [error(weight_bits=8, activation_bits=8), error(activation_bits=8), error(activation_bits=4)]
    assert by_width == sorted(by_width)
    assert by_width[0] < 0.05


def test_widths_by_role():
    made = program(bits={"down": (8, 8), "o": (16, 16), "v": (4, 16)}, activation_bits=8, rotate="never", weights="rtn")
    passes = {d.facts["role"]: (d.pass_name, d.options.get("activation_bits"), d.status) for d in made.decisions}
    assert passes["down"] == ("quantize_linear", None, "kept")
    assert passes["o"][2] == "refused"
    assert passes["v"] == ("quantize_linear_int4", 16, "kept")
    assert passes["q"] == ("quantize_linear_int4", 8, "kept")
    assert not made.profile.tensors


def test_never_means_that_nothing_is_rotated():
    made = program(rotate="never", weights="rtn")
    assert not kept(made, "rotate")
    assert not kept(made, "rotate_heads")
    assert not any("hadamard" in d.options for d in made.decisions)


def test_a_rotation_that_does_not_help_is_not_made():
    """Random tokens through a random model have no outliers: what is kept was measured to be better."""
    made = program(activation_bits=8)
    for decision in made.decisions:
        measured = decision.facts.get("error unrotated, rotated")
        if measured is not None and decision.status == "kept" and not decision.options.get("keys"):
            before, after = map(float, measured.split(", "))
            assert after < before
        if decision.status == "refused" and decision.pass_name == "rotate":
            assert decision.reason == "measured no better than unrotated"


def test_seeds_repeat():
    first, second = (program(rotate="always", seed=0, damp=damp) for damp in (0.1, 0.1000001))
    name = next(name for name in first.profile.tensors if name.endswith(".rotation"))
    assert torch.equal(first.profile.tensors[name], second.profile.tensors[name])
    other = program(rotate="always", seed=1)
    assert not torch.equal(first.profile.tensors[name], other.profile.tensors[name])


def test_a_profile_replays_bit_equal_in_a_new_process(tmp_path):
    made = program(rotate="always", kv_bits=4)
    assert_replays(made, logits(made), "tests.profiles.test_dartquant", tmp_path)


def test_saves_loads_and_generates(tmp_path):
    made = program(rotate="always", activation_bits=8)
    made.save(tmp_path / "p.gw")
    loaded = gw.load(tmp_path / "p.gw")
    assert torch.equal(logits(loaded), logits(made))
    assert torch.equal(loaded.generate(TEXTS[:1, :5], 6), made.generate(TEXTS[:1, :5], 6))
    assert loaded.profile.tensors.keys() == made.profile.tensors.keys()


# ---- the profile's tensors


@pytest.fixture
def saved(tmp_path):
    program(rotate="always").profile.save(tmp_path / "p.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.safetensors"]
    return tmp_path


def replay(folder) -> gw.Program:
    return gw.optimize(captured_llama(), profile=folder / "p.json", progress=False)


@pytest.mark.parametrize("name", ["../p.safetensors", "/p.safetensors", "a/p.safetensors", "..", ""])
def test_the_tensor_file_stays_in_its_folder(saved, name):
    document = json.loads((saved / "p.json").read_text())
    document["tensor_file"]["file"] = name
    (saved / "p.json").write_text(json.dumps(document))
    with pytest.raises(InvalidFile, match="is no plain file name"):
        replay(saved)


def test_another_tensor_file_is_refused(saved):
    path = saved / "p.safetensors"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1])
    with pytest.raises(InvalidFile, match=r"got \d+ bytes, the profile was saved with"):
        replay(saved)
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match="its contents are not those"):
        replay(saved)
    path.unlink()
    with pytest.raises(InvalidFile, match="are missing"):
        replay(saved)


def test_a_rotation_that_is_not_orthogonal_is_refused():
    profile = program(rotate="always").profile.model_copy(deep=True)
    name = next(name for name in profile.tensors if name.endswith(".rotation"))
    profile.tensors[name] = profile.tensors[name] * 1.01
    with pytest.raises(InvalidArgument, match="is not orthogonal"):
        gw.optimize(captured_llama(), profile=profile, progress=False)


def test_a_profile_without_its_tensors_is_refused():
    profile = program(rotate="always").profile.model_copy(deep=True)
    profile.tensors.clear()
    with pytest.raises(InvalidArgument, match="the profile has no tensor"):
        gw.optimize(captured_llama(), profile=profile, progress=False)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_bits": 3}, "weight_bits"),
        ({"kv_bits": 2}, "kv_bits"),
        ({"roles": ("queries",)}, "unknown role 'queries'"),
        ({"bits": {"queries": (4, 4)}}, "unknown role 'queries'"),
        ({"bits": {"q": (4,)}}, "bits"),
        ({"clip": 1.5}, "clip"),
        ({"lr": 0}, "lr"),
        ({"lr_schedule": "linear"}, "lr_schedule"),
        ({"weights": "awq"}, "weights"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_wrong_options(options, reason):
    with pytest.raises(InvalidArgument, match=reason):
        DartQuant(**options)


@pytest.mark.parametrize(
    ("calibration", "reason"),
    [
        (None, "needs at least 128 tokens of calibration"),
        ([TEXTS[:1]], "needs at least 128 tokens of calibration, got 31"),
        ([], "calibration is empty"),
        ([TEXTS + VOCABULARY], "outside the vocabulary"),
    ],
)
def test_calibration_that_is_too_little_or_wrong(calibration, reason):
    with pytest.raises(GraphwrightError, match=reason):
        gw.optimize(captured_llama(), methods=[DartQuant(**QUICK)], calibration=calibration, progress=False)


def test_a_group_that_does_not_divide_is_said_at_the_site():
    made = program(group=64, rotate="never", weights="rtn")
    refused = {(d.facts["role"], d.reason) for d in made.decisions if d.status == "refused"}
    assert ("down", "groups of 64 do not divide 96 channels; 32 does") in refused
    assert len(kept(made, "quantize_linear_int4")) == 3 * 12


def test_there_is_no_operator_for_some_widths():
    made = program(bits={"q": (8, 4)}, rotate="never", weights="rtn", activation_bits=8)
    reasons = {d.reason for d in made.decisions if d.facts["role"] == "q"}
    assert reasons == {"there is no operator for W8A4"}


def test_activations_with_nan_are_refused():
    model = Mlp().eval()
    batch = torch.randn(200, 32)
    batch[7, 3] = float("nan")
    with pytest.raises(InvalidArgument, match="hold NaN or infinity"):
        gw.optimize(
            model, (torch.randn(200, 32),), methods=[DartQuant(**QUICK)], calibration=[((batch,), {})], progress=False
        )


def test_a_model_that_is_quantized_already_is_refused():
    model = Mlp().eval()
    first = gw.optimize(model, (torch.randn(200, 32),), methods=[gw.Int8()], keep="smaller", progress=False)
    exported = first.phases["main"].exported
    with pytest.raises(GraphwrightError, match=r"graphwright.*int8_linear|no linear of this program"):
        gw.optimize(exported, methods=[DartQuant(**QUICK)], progress=False)


def test_a_width_without_a_hadamard_matrix_is_rotated_in_blocks_and_the_report_says_so():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up, self.down = (torch.nn.Linear(*s) for s in ((32, 1376), (32, 1376), (1376, 32)))

        def forward(self, x):
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    x = torch.randn(200, 32)
    method = DartQuant(**QUICK, rotate="always")
    made = gw.optimize(Odd().eval(), (x,), methods=[method], calibration=[((x,), {})], keep="smaller", progress=False)
    (down,) = [d for d in made.decisions if d.facts["role"] == "down"]
    assert down.status == "kept"
    assert down.facts["online rotation"] == "43 blocks of H32"
    assert "43 blocks of H32" in made.explain(down.site)


# ---- the parts


def test_whip_falls_and_so_does_the_rounding_error():
    """Rows of a few directions that are far from zero, and one large channel: none > random Hadamard > fitted."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 64, generator=generator)
    sizes = torch.randn(2048, 4, generator=generator).sign() * (1 + 0.2 * torch.randn(2048, 4, generator=generator))
    rows = sizes @ directions + 0.2 * torch.randn(2048, 64, generator=generator)
    rows[:, 3] *= 8
    rows /= rows.square().mean(-1, keepdim=True).sqrt()  # as a norm gives them
    start = random_hadamard(64, generator)
    fitted = fit_rotation(rows[:1024], start, steps=60, lr=1e-2, batch=512, generator=generator)
    held_out = rows[1024:]
    errors = [rounding_error(held_out @ r, 4, 0.9) for r in (torch.eye(64), start, fitted)]
    assert errors[0] > errors[1] > errors[2]
    assert whip(held_out @ fitted) < whip(held_out @ start)
    assert (fitted.T @ fitted - torch.eye(64)).abs().max() < 1e-5


def test_a_cosine_schedule_is_gentler_than_a_constant_rate():
    """The learning rates add up to half of the constant ones, so that a high rate ends near a minimum."""
    rows = torch.randn(512, 12, generator=torch.Generator().manual_seed(0)) ** 3
    rows /= rows.square().mean(-1, keepdim=True).sqrt()
    start = random_hadamard(12, torch.Generator().manual_seed(1))

    def fitted(schedule, steps):
        generator = torch.Generator().manual_seed(2)
        options = {"lr": 0.3, "batch": 64, "generator": generator, "schedule": schedule}
        return fit_rotation(rows, start, steps=steps, **options)

    # The first step has the whole rate.
    assert torch.equal(fitted("cosine", 1), fitted("constant", 1))
    assert not torch.equal(fitted("cosine", 60), fitted("constant", 60))
    assert whip(rows @ fitted("cosine", 60)) < whip(rows @ fitted("constant", 60))


def test_no_steps_keep_the_start_up_to_signs():
    start = random_hadamard(12, torch.Generator().manual_seed(0))
    assert torch.allclose(start.abs(), matrix(12).abs().float())
    fitted = fit_rotation(torch.randn(20, 12), start, steps=0, lr=1.0, batch=4, generator=torch.Generator())
    assert torch.allclose(fitted.abs(), start.abs(), atol=1e-6)


def test_gptq_errs_less_than_rounding_to_nearest_on_what_it_saw():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 128, generator=generator)
    rows = torch.randn(600, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    rows[:, 5] = 0
    expected = rows @ weight.T

    def error(made) -> float:
        return float((rows @ dequantized(made).T - expected).norm() / expected.norm())

    learned = gptq(weight, rows.T @ rows, 64, 0.01)
    assert error(learned) < 0.8 * error(quantize_groups(weight, 64))
    assert not dequantized(learned)[:, 5].any(), "a channel that is always zero keeps no weight"


def test_the_rounded_program_in_the_profile_is_what_runs():
    """The tensors that a profile carries are those of the graph, not copies that could differ."""
    made = program(rotate="always")
    exported = made.phases["prefill"].exported
    packed = [name for name in made.profile.tensors if name.endswith(".packed")]
    assert len(packed) == 14
    assert all(made.profile.tensors[name].data_ptr() == exported.state_dict[name].data_ptr() for name in packed)
    assert run_functional(exported, [TEXTS[:1], torch.arange(TEXTS.shape[1])])[-1].isfinite().all()


def test_what_is_slower_in_4_bits_becomes_int8(monkeypatch) -> None:
    """Measured times decide; here they are given, so that the test does not rest on this machine's."""
    module = importlib.import_module("graphwright.optimize")  # the name in the package is the function

    def times(exported, phase, decisions, inputs, shared, least):
        gains = {"quantize_linear_int4": 0.5, "quantize_linear": 2.0}
        slow = {d.site: gains[d.pass_name] if d.facts["role"] == "down" else 2.0 for d in decisions}
        return {site: SiteMeasure(0.1, 1.0, 1.0 / gain) for site, gain in slow.items()}, {}

    monkeypatch.setattr(module, "measure_sites", times)
    method = gw.DartQuant(rotate="never", weights="rtn", activation_bits=8, group=32)
    program = gw.optimize(captured_llama(), methods=[method], calibration=[tokens(24)], progress=False)
    for decision in program.decisions:
        if decision.status != "kept":
            continue
        down = decision.facts["role"] == "down"
        assert decision.pass_name == ("quantize_linear" if down else "quantize_linear_int4")
        assert ("since W4A8 was measured slower" in decision.facts["precision"]) == down
    replayed = gw.optimize(captured_llama(), profile=program.profile, progress=False)
    ids = tokens(12)
    assert torch.equal(program(ids, torch.arange(12)), replayed(ids, torch.arange(12)))
    floats = gw.optimize(
        captured_llama(),
        methods=[method.model_copy(update={"slow": "float"})],
        calibration=[tokens(24)],
        progress=False,
    )
    assert {d.status for d in floats.decisions if d.facts["role"] == "down"} == {"refused"}
