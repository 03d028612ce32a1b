"""The latent grid of the five video transformer families, proved from their graphs."""

import pytest
import torch

import graphwright as gw
from graphwright.patterns.graph import GraphView
from graphwright.patterns.grid import find_grid
from tests.models import Mlp


def wan():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=8, ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }
    return model, inputs, (3, 4, 6)


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=1, sample_width=12, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=7,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500]),
    }
    return model, inputs, (3, 4, 6)


def hunyuan():
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "encoder_attention_mask": torch.ones(1, 7),
        "pooled_projections": torch.randn(1, 8),
    }
    return model, inputs, (3, 4, 6)


def mochi():
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=7,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, 7, dtype=torch.bool),
    }
    return model, inputs, (3, 4, 6)


@pytest.mark.parametrize("make", [wan, cogvideox, hunyuan, mochi], ids=lambda make: make.__name__)
def test_the_grid_is_proved_and_the_program_is_the_model(make) -> None:
    torch.manual_seed(0)
    model, inputs, grid = make()
    model = model.eval()
    captured = gw.capture_denoiser(model, inputs)
    assert captured.facts["grid"] == list(grid)
    assert captured.facts["timestep"] == "timestep"
    program = gw.optimize(captured)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(program(**inputs), expected, rtol=1e-4, atol=1e-5)
    (sample,) = program.as_module()(**inputs, return_dict=False)
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
    kinds = {site.attention for site in program.sites["main"].attention}
    assert kinds == ({"self", "cross"} if make is wan else kinds & {"self", "cross", "joint"})


def test_dynamic_frames_stay_dynamic_in_the_grid() -> None:
    model, inputs, grid = wan()
    captured = gw.capture_denoiser(model.eval(), inputs, dynamic_frames=True)
    assert captured.facts["grid"] == [None, *grid[1:]]
    program = gw.optimize(captured)
    longer = {**inputs, "hidden_states": torch.randn(1, 4, 5, 8, 12)}
    with torch.no_grad():
        torch.testing.assert_close(program(**longer), model(**longer, return_dict=False)[0], rtol=1e-4, atol=1e-5)


def test_no_evidence_is_no_grid() -> None:
    exported = torch.export.export(Mlp().eval(), (torch.randn(2, 32),)).run_decompositions({})
    assert find_grid(GraphView(exported)) is None


def test_an_unknown_timestep_input_is_named() -> None:
    model, inputs, _ = wan()
    with pytest.raises(gw.GraphwrightError, match="no input is called 'sigma'; the inputs are hidden_states"):
        gw.capture_denoiser(model, inputs, timestep="sigma")
