"""What capture takes, what it proves, and what it refuses."""

from dataclasses import dataclass

import pytest
import torch

import graphwright as gw
from graphwright.errors import CaptureError, InvalidArgument, InvalidFile, InvalidType
from tests.models import Mlp, tiny_llama, tokens


def test_a_pt2_file_and_an_exported_program_are_taken(tmp_path) -> None:
    x = torch.randn(4, 32)
    exported = torch.export.export(Mlp().eval(), (x,))
    torch.export.save(exported, tmp_path / "mlp.pt2")
    for source in (exported, tmp_path / "mlp.pt2", str(tmp_path / "mlp.pt2")):
        program = gw.optimize(source)
        torch.testing.assert_close(program(x), Mlp()(x))


@dataclass
class Point:
    """An input that torch.export.save can only pickle."""

    x: torch.Tensor


def test_a_pt2_file_that_needs_pickle_is_refused(tmp_path) -> None:
    class Takes(torch.nn.Module):
        def forward(self, point):
            return point.x + 1

    torch.export.register_dataclass(Point, serialized_type_name="tests.Point")
    exported = torch.export.export(Takes(), (Point(torch.ones(2)),))
    torch.export.save(exported, tmp_path / "point.pt2")
    with pytest.raises(InvalidFile, match="trust=True"):
        gw.capture(tmp_path / "point.pt2")
    assert gw.capture(tmp_path / "point.pt2", trust=True).exported.graph is not None


@pytest.mark.parametrize("content", [None, b"", b"not a zip"], ids=["missing", "empty", "foreign"])
def test_files_that_are_no_pt2_are_named(tmp_path, content) -> None:
    path = tmp_path / "model.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidFile, match=r"model\.pt2"):
        gw.capture(path)


def test_a_truncated_pt2_is_named(tmp_path) -> None:
    torch.export.save(torch.export.export(Mlp().eval(), (torch.randn(4, 32),)), tmp_path / "m.pt2")
    whole = (tmp_path / "m.pt2").read_bytes()
    (tmp_path / "m.pt2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidFile, match=r"m\.pt2"):
        gw.capture(tmp_path / "m.pt2")


def test_wrong_models_and_arguments() -> None:
    with pytest.raises(InvalidType, match="got int"):
        gw.capture(3)
    with pytest.raises(InvalidType, match="args must be a tuple"):
        gw.capture(Mlp().eval(), torch.randn(4, 32))
    with pytest.raises(CaptureError, match="training mode"):
        gw.capture(Mlp().train(), (torch.randn(4, 32),))
    with pytest.raises(CaptureError, match=r"torch.export could not capture Mlp"):
        gw.capture(Mlp().eval(), (torch.randn(4, 31),))


def test_a_program_exported_in_training_mode_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).train()
    exported = torch.export.export(model, (torch.randn(2, 8),))
    with pytest.raises(CaptureError, match="drops values"):
        gw.capture(exported)


def test_a_layer_without_a_cache_is_named():
    """A hybrid: its first layer is a convolution, which keeps other state."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    layers = ["conv", "full_attention"]
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, num_hidden_layers=2, num_key_value_heads=2, layer_types=layers)).eval()
    with pytest.raises(CaptureError, match="layer 0 keeps no key-value cache"):
        gw.capture_causal_lm(model, 16)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = Mlp().eval()
    with torch.no_grad():
        model.fc2.weight[3, 4] = float("nan")
    with pytest.raises(CaptureError, match=r"fc2\.weight holds NaN"):
        gw.capture(model, (torch.randn(4, 32),))


def test_keyword_arguments_keep_their_names() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x, *, factor):
            return x * factor

    program = gw.optimize(Scaled().eval(), (torch.ones(3),), {"factor": torch.tensor(2.0)})
    assert torch.equal(program(torch.ones(3), factor=torch.tensor(3.0)), torch.full((3,), 3.0))
    assert torch.equal(program(factor=torch.tensor(3.0), x=torch.ones(3)), torch.full((3,), 3.0))


def test_a_cache_that_is_too_short_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="max_cache_len must be at least 4"):
        gw.capture_causal_lm(tiny_llama(), 2)


def test_last_logits_only() -> None:
    program = gw.optimize(gw.capture_causal_lm(tiny_llama(), 32, logits_to_keep=1))
    assert program(tokens(9), torch.arange(9)).shape == (1, 1, 97)
    assert program.generate(tokens(9), 5).shape == (1, 14)


def test_a_batch_of_sequences() -> None:
    program = gw.optimize(gw.capture_causal_lm(tiny_llama(), 32, batch_size=3))
    ids = torch.cat([tokens(8, seed) for seed in range(3)])
    with torch.no_grad():
        expected = tiny_llama()(ids).logits
    torch.testing.assert_close(program(ids, torch.arange(8)), expected, rtol=1e-4, atol=1e-5)


def _config(name: str, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**common, **options})).eval()


DECODERS = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": {},
    "olmo2": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", DECODERS)
def test_other_decoders_run_all_phases(name) -> None:
    """Families that differ in norms, rotary layout, fused projections, windows and soft-capped scores."""
    model = _config(name, **DECODERS[name])
    ids = tokens(20)
    with torch.no_grad():
        expected = model(ids).logits
    program = gw.optimize(gw.capture_causal_lm(model, 32))
    got = [
        program(ids[:, :9], torch.arange(9)),
        program(ids[:, 9:16], torch.arange(9, 16)),
        *(program(ids[:, i : i + 1], torch.tensor([i])) for i in range(16, 20)),
    ]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=2e-4, atol=2e-5)
