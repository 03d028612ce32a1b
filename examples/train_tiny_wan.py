"""Train the small video transformer of `examples/models/tiny_wan`: `python examples/train_tiny_wan.py --output folder`.

Flow matching: a latent x and noise e are mixed to (1 - sigma) x + sigma e, and the model learns the velocity e - x.
Sigma is spread over each batch with the density that `sample_video.noise_levels` samples with. Latents, timesteps and
prompts are those of `sample_video` and `load_tiny_wan`. The steps change between sizes, most of them small; the
learning rate falls with the time that is used, so training ends well whenever it is told to end.

The averaged weights are written every minute and at the end, with the loss curve (`training.json`, `loss.png`). Clips
come from `training_clips.py`, or from a file that it has written: `--clips clips.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from graphwright.examples.extra import demo_extra
from graphwright.examples.load_tiny_wan import load_prompts
from graphwright.examples.muon import Muon
from graphwright.examples.sample_video import sample, video_to_latent, write_png_grid
from graphwright.examples.training_clips import Footage, decode_clips, load_clips

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

CONFIG = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 12,
    "out_channels": 12,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 1024,
    "num_layers": 8,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


@dataclass(frozen=True)
class Size:
    """Videos of `frames` times `pixels` x `pixels`, how likely a step takes them first and last."""

    frames: int
    pixels: int
    first: float
    last: float

    @property
    def tokens(self) -> int:
        """Length of the sequence; a token is 4x4 pixels of a frame."""
        return self.frames * (self.pixels // 4) ** 2

    def __str__(self) -> str:
        return f"{self.frames}x{self.pixels}x{self.pixels}"


SIZES = (Size(8, 32, 0.15, 0.05), Size(8, 64, 0.45, 0.25), Size(16, 64, 0.30, 0.35), Size(16, 128, 0.10, 0.35))
# The highest learning rates: of Muon for the matrices of the blocks, of AdamW for everything else. After 300 steps at 8
# frames of 64x64 the loss was 0.155; with 2e-3 for both 0.182; with AdamW for everything 0.194 (2e-3), 0.219 (1e-3).
_MATRIX_RATE, _OTHER_RATE = 5e-3, 2e-3


@dataclass
class Training:
    """What is trained and for how long, and the loss as it went.

    Args:
        minutes: Time for everything, compiling included; more than 0. One step is made in any case.
        steps: Stop after so many steps, if the time is not over before.
        tokens: Of a batch; small videos come in larger batches.
        sizes: What a batch can be.
        seed: Of weights, batches and noise. Steps that a time limit ends differ from run to run all the same.
        device: Where to train.
        config: The arguments of `WanTransformer3DModel`.
        started: When the time begins, of `time.monotonic`.
        curve: Filled as training goes on: step, seconds, and the mean loss of each size since the last record.
    """

    minutes: float = 8.0
    steps: int | None = None
    tokens: int = 65536
    sizes: Sequence[Size] = SIZES
    seed: int = 0
    device: str = "cpu"
    config: Mapping[str, Any] = field(default_factory=lambda: CONFIG)
    started: float = field(default_factory=time.monotonic)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def done(self, step: int) -> float:
        """The share of the training that lies behind."""
        used = (time.monotonic() - self.started) / (60 * self.minutes)
        return min(1.0, max(used, step / self.steps if self.steps else 0.0))


def train(clips: Mapping[str, Tensor], training: Training, folder: Path) -> WanTransformer3DModel:
    """Train a model and write it.

    Args:
        clips: As `decode_clips` gives them.
        training: How long, how much and where.
        folder: Where to write `model.safetensors`, `config.json`, `prompts.safetensors` and `training.json`.

    Returns:
        The model with the averaged weights, on the training's device, in evaluation mode.

    Raises:
        MissingExtra: diffusers is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    cuda = training.device.startswith("cuda")
    footage = Footage(clips, training.device)
    embeddings = load_prompts()
    prompts = torch.cat([embeddings[name] for name in footage.prompts]).to(training.device)
    model = _new(training)
    average = _new(training).eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    if cuda:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    optimizers = _optimizers(model, fused=cuda)
    losses: list[tuple[str, Tensor]] = []
    step, written = 0, training.started
    while (done := training.done(step)) < 1 or step == 0:
        chances = torch.tensor([size.first + done * (size.last - size.first) for size in training.sizes])
        size = training.sizes[int(torch.multinomial(chances, 1, generator=generator))]
        videos, kinds = footage.draw(max(1, training.tokens // size.tokens), size.frames, size.pixels, generator)
        share = min(1.0, (step + 1) / 200) * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext(), _attention(cuda):
            loss = flow_matching_loss(model, videos, prompts[kinds.to(prompts.device, non_blocking=True)], generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # A young average forgets the random weights that it began with.
        update = get_ema_multi_avg_fn(min(0.999, (1 + step) / (10 + step)))
        update(list(average.parameters()), list(model.parameters()), step)
        losses.append((str(size), loss.detach()))
        step += 1
        if step % 50 == 0:
            _record(training, step, losses)
        if time.monotonic() - written > 60:
            write_model(average, training.config, folder)
            written = time.monotonic()
    _record(training, step, losses)
    write_model(average, training.config, folder)
    _write_training(model, training, folder)
    return average


def _new(training: Training) -> WanTransformer3DModel:
    with demo_extra():
        from diffusers import WanTransformer3DModel
    # Pyright loses the signature of diffusers' `to`, which is wrapped.
    model: Any = WanTransformer3DModel(**training.config)
    return model.to(training.device)


def _optimizers(model: WanTransformer3DModel, fused: bool) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers, with the highest learning rate of each."""
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    inside = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    return [(Muon(matrices), _MATRIX_RATE), (adam, _OTHER_RATE)]


def _attention(cuda: bool) -> AbstractContextManager[Any]:
    """Prefer cuDNN's attention: on an H200, 8 ms forward and backward for 4 x 16384 tokens, where flash takes 14 ms."""
    kinds = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(kinds), set_priority=True) if cuda else nullcontext()


def flow_matching_loss(model: nn.Module, videos: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity, a scalar.

    Args:
        model: Called as diffusers calls it.
        videos: [B, T, 3, H, W] in [0, 1].
        prompts: [B, L, C].
        generator: Of the sigmas, one in each of B equal parts of the schedule. The noise is of the device's generator.
    """
    count = len(videos)
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    # In another order than the prompts, which take turns.
    even = even[torch.randperm(count, generator=generator)]
    sigma = (3 * even / (1 + 2 * even)).to(videos.device, non_blocking=True)
    data = video_to_latent(videos.flatten(0, 1))[0].unflatten(1, videos.shape[:2]).transpose(0, 1)
    noise = torch.randn_like(data)
    mixed = torch.lerp(data, noise, sigma[:, None, None, None, None])
    velocity = model(mixed, 1000 * sigma, prompts, return_dict=False)[0]
    return functional.mse_loss(velocity.float(), noise - data)


def write_model(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Write weights (bfloat16), configuration and prompts, as `load_tiny_wan` reads them."""
    weights = {name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    # A cut in the middle of writing leaves the weights of the minute before.
    save_file(weights, folder / "next.safetensors")
    (folder / "next.safetensors").replace(folder / "model.safetensors")
    named = {"_class_name": "WanTransformer3DModel", **config}
    (folder / "config.json").write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    save_file({"text": torch.cat(list(load_prompts().values()))}, folder / "prompts.safetensors")


def _record(training: Training, step: int, losses: list[tuple[str, Tensor]]) -> None:
    """Move the losses since the last record into the curve, as one mean for each size."""
    if not losses:
        return
    values = torch.stack([loss for _, loss in losses]).tolist()
    by_size: dict[str, list[float]] = {}
    for (size, _), value in zip(losses, values, strict=True):
        by_size.setdefault(size, []).append(value)
    means = {size: round(sum(own) / len(own), 5) for size, own in sorted(by_size.items())}
    training.curve.append({"step": step, "seconds": round(time.monotonic() - training.started, 1), "loss": means})
    losses.clear()


def _write_training(model: nn.Module, training: Training, folder: Path) -> None:
    name = torch.cuda.get_device_name() if training.device.startswith("cuda") else "CPU"
    facts = {
        "device": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": training.curve[-1]["seconds"],
        "steps": training.curve[-1]["step"],
        "tokens": training.tokens,
        "curve": training.curve,
    }
    (folder / "training.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    write_loss_curve(training.curve, folder / "loss.png")


_COLOURS = ("crimson", "royalblue", "seagreen", "darkorange")


def write_loss_curve(curve: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of each size over the steps, on a logarithmic scale, as a PNG.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    with demo_extra():
        from PIL import Image, ImageDraw
    width, height, margin = 640, 360, 40
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    values = [math.log(loss) for record in curve for loss in record["loss"].values()]
    low, high, last = min(values), max(values), curve[-1]["step"]

    def at(step: float, loss: float) -> tuple[float, float]:
        up = (math.log(loss) - low) / max(high - low, 1e-9)
        return margin + step / last * (width - 2 * margin), height - margin - up * (height - 2 * margin)

    for loss in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        if low <= math.log(loss) <= high:
            draw.line([at(0, loss), at(last, loss)], fill="lightgray")
            draw.text((5, at(0, loss)[1] - 6), str(loss), fill="black")
    draw.text((margin, height - margin + 8), f"mean squared error of the velocity, steps 0 to {last}", fill="black")
    names = sorted({name for record in curve for name in record["loss"]})
    for place, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        points = [at(record["step"], record["loss"][name]) for record in curve if name in record["loss"]]
        draw.line(points, fill=colour, width=2)
        draw.text((width - 120, 10 + 14 * place), name, fill=colour)
    picture.save(path, format="PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the model and its pictures")
    parser.add_argument("--clips", type=Path, help="decoded clips; without them they are decoded here")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything but the samples")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--tokens", type=int, help="of a batch; larger videos are left out. 65536 on a GPU, else 2048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", action="store_true", help="sample all prompts at three sizes, as PNG")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = options.tokens or (65536 if device == "cuda" else 2048)
    sizes = [size for size in SIZES if size.tokens <= tokens]
    if not sizes:
        parser.error(f"got --tokens {tokens}, expected at least {SIZES[0].tokens}")
    training = Training(options.minutes, options.steps, tokens, sizes, options.seed, device)
    model = train(load_clips(options.clips) if options.clips else decode_clips(), training, options.output)
    print(json.dumps(training.curve[-1]))
    if options.samples:
        for size in SIZES[1:]:
            show(model, size, options.output / f"{size}.png")


@torch.no_grad()
def show(model: WanTransformer3DModel, size: Size, path: Path, steps: int = 30) -> None:
    """Sample a video of each prompt, and write five frames of each as a picture."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    videos = [
        sample(model, prompt.to(device), frames=size.frames, height=size.pixels, width=size.pixels, steps=steps)
        for prompt in load_prompts().values()
    ]
    write_png_grid(path, videos, [round(i * (size.frames - 1) / 4) for i in range(5)], zoom=128 // size.pixels)


if __name__ == "__main__":
    main()
