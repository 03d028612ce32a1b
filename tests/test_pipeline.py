"""A diffusers pipeline with a program in the place of its transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphwright as gw

STEPS = 4


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=64, ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe: Any, transformer: Any) -> torch.Tensor:
    """Frames [1, T, 3, H, W] with classifier-free guidance: two calls a step."""
    generator = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, 1, 16, 32, generator=generator)
    original, pipe.transformer = pipe.transformer, transformer
    try:
        return pipe(
            prompt_embeds=prompt, negative_prompt_embeds=negative, height=64, width=64, num_frames=17,
            num_inference_steps=STEPS, guidance_scale=5.0, generator=generator, output_type="pt",
        ).frames  # fmt: skip
    finally:
        pipe.transformer = original


def test_a_program_stands_in_for_the_transformer_of_a_pipeline(pipeline):
    pipeline.scheduler.set_timesteps(STEPS)
    inputs = {
        "hidden_states": torch.zeros(1, 16, 5, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, 32),
    }
    captured = gw.capture_denoiser(pipeline.transformer, inputs, timesteps=pipeline.scheduler.timesteps)
    expected = video(pipeline, pipeline.transformer)
    assert torch.equal(video(pipeline, gw.optimize(captured).as_module()), expected)

    def sampler(denoiser: Any) -> torch.Tensor:
        return video(pipeline, denoiser)

    late = gw.capture_denoiser(pipeline.transformer, inputs, timesteps=[2000, 1900, 1800, 1700])
    with pytest.raises(gw.GraphwrightError, match="the sampler made 8 calls, none in phase"):
        gw.optimize(late, methods=[gw.RainFusion(dense_steps=0.25)], calibration=[sampler], progress=False)

    method = gw.RainFusion(dense_steps=0.25, grid=(5, 4, 4))
    program = gw.optimize(captured, methods=[method], calibration=[sampler], keep="smaller", progress=False)
    assert {d.status for d in program.decisions if d.phase == "sparse" and d.facts["attention"] == "self"} == {"kept"}
    (quality,) = program.history.measured["video"]
    assert 30 < quality["psnr"] < 200
    assert 0.9 < quality["ssim"] <= 1
    got = video(pipeline, program.as_module())
    assert not torch.equal(got, expected)
    assert "PSNR" in str(program.report())
