"""A small trained video diffusion transformer through one `optimize()` call: `python examples/tiny_wan.py`."""

from __future__ import annotations

import argparse
import time

import torch

import graphwright as gw
from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.examples.sample_video import sample, write_png_grid
from graphwright.quality import psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="int8", help="a method's name, or 'none' for the canonical program")
    parser.add_argument("--prompt", default="bikes", help="one of the four prompts that the model was trained on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--png", help="write frames here, the model's above the program's")
    options = parser.parse_args()

    model, prompt = load_tiny_wan(), load_prompts()[options.prompt]
    inputs = {
        "hidden_states": torch.zeros(1, 12, 8, options.size // 2, options.size // 2),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": prompt,
    }
    captured = gw.capture_denoiser(model, inputs)
    methods = [] if options.method == "none" else [options.method]
    program = gw.optimize(captured, methods=methods, calibration=[((), inputs)])
    print(program.report())
    print(f"latent grid {captured.facts['grid']}")

    videos, shape = {}, {"frames": 8, "height": options.size, "width": options.size, "steps": options.steps}
    for name, denoise in (("model", lambda **kw: model(**kw, return_dict=False)[0]), ("program", program)):
        started = time.perf_counter()
        with torch.no_grad():
            videos[name] = sample(denoise, prompt, **shape)
        print(f"{name}: {time.perf_counter() - started:.1f} s for {options.steps} steps")
    print(f"PSNR of the program's video against the model's: {psnr(videos['model'], videos['program']):.1f} dB")
    if options.png:
        write_png_grid(options.png, list(videos.values()), range(8))


if __name__ == "__main__":
    main()
