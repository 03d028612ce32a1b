"""Where the heads of the small video transformer look: `python examples/measure_heads.py` prints a table in Markdown.

A video is sampled for each prompt and mixed with as much noise (sigma 0.5); the shares of attention are means over the
queries and the prompts. A query's key is at an offset of (dt, dh, dw) tokens from it:

local      its own frame, dh and dw at most 2
temporal   every frame, dh and dw at most 1: the same place, all the time
global     everything that is in neither of the two
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from graphwright.examples.load_tiny_wan import load_prompts, load_tiny_wan
from graphwright.examples.sample_video import sample, video_to_latent
from graphwright.kernels.band_recall import band_recall
from graphwright.kernels.head_patterns import bandwidth_of
from graphwright.kernels.tile_mass import tile_counts, tile_mass, tile_order
from graphwright.kernels.token_order import token_order

_SIGMA = 0.5
# Every third token of the queries: with sizes that are no multiple of 3 all columns are seen.
_STRIDE = 3
# The width of RainFusion's bands at its published sparsity of 0.5.
_BAND = bandwidth_of(0.5)


@dataclass(frozen=True)
class Head:
    """Shares of the attention of one head, and the recall of RainFusion's two bands."""

    local: float
    temporal: float
    rest: float
    band_temporal: float
    band_spatial: float


def head_shares(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[list[Head]]:
    """Measure all self-attentions of one call of a video transformer.

    Args:
        model: Its self-attentions call torch's `scaled_dot_product_attention`, its tokens are patches of 2x2 latents.
        inputs: `hidden_states` [1, C, T, H, W] and what else `model` takes.

    Returns:
        The heads of each layer.
    """
    frames, rows, columns = inputs["hidden_states"].shape[2:]
    layers: list[list[Head]] = []
    with torch.no_grad(), _attentions(lambda q, k: layers.append(_measure(q, k, frames, rows // 2, columns // 2))):
        model(**inputs)
    return layers


def _measure(query: Tensor, key: Tensor, frames: int, height: int, width: int) -> list[Head]:
    sizes = {"frames": frames, "height": height, "width": width}
    tile = (1, 1, 1)
    mass, _ = tile_mass(query, key, tile_order(**sizes, tile=tile), **sizes, tile=tile, stride=_STRIDE)
    local, temporal = pattern_masks(**sizes)
    band = torch.tensor([int(_BAND * query.shape[2])], dtype=torch.int32)
    orders = [token_order(kind, **sizes).long() for kind in ("frame_last", "raster")]
    bands = [band_recall(query[:, :, order], key[:, :, order], band)[0, :, 0] for order in orders]
    shares = [(mass[0] * mask).sum((1, 2, 3)) for mask in (local, temporal, ~(local | temporal))]
    return [Head(*values) for values in torch.stack([*shares, *bands], dim=1).tolist()]


def pattern_masks(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Which offsets (dt, dh, dw) are local and which are temporal, bool [frames, height, width] each."""
    dt, dh, dw = torch.meshgrid(*(torch.arange(size) for size in (frames, height, width)), indexing="ij")
    far = torch.maximum(dh, dw)
    return (dt == 0) & (far <= 2), far <= 1


@contextmanager
def _attentions(see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Show query and key [B, H, N, D] of each self-attention that is called inside."""

    class Watching(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if function is scaled_dot_product_attention:
                query, key = (args[at] if at < len(args) else kwargs[name] for at, name in enumerate(("query", "key")))
                if query.shape == key.shape:
                    see(query, key)
            return function(*args, **kwargs)

    with Watching():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels; a token is 4x4 of them")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    sizes = {"frames": options.frames, "height": options.size, "width": options.size}
    model = load_tiny_wan()
    runs: list[list[list[Head]]] = []
    for prompt in load_prompts().values():
        latent = video_to_latent(sample(model, prompt, **sizes, steps=options.steps))
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
        mixed = torch.lerp(latent, noise, _SIGMA)
        inputs = {"hidden_states": mixed, "timestep": torch.tensor([1000 * _SIGMA]), "encoder_hidden_states": prompt}
        runs.append(head_shares(model, inputs))
    grid = (options.frames, options.size // 4, options.size // 4)
    counts = tile_counts(*grid, tile=(1, 1, 1))
    local, temporal = ((counts * mask).sum().item() / counts.sum().item() for mask in pattern_masks(*grid))
    print(f"Share of all pairs: local {local:.1%}, temporal {temporal:.1%}; bands of {_BAND} of the tokens.\n")
    print(
        "| layer | head | local | temporal | global | band (h, w, t) | band (t, h, w) |\n|---|---|---|---|---|---|---|"
    )
    for layer, runs_of_layer in enumerate(zip(*runs, strict=True)):
        for head, found in enumerate(zip(*runs_of_layer, strict=True)):
            figures = torch.tensor([list(vars(each).values()) for each in found]).mean(0).tolist()
            print(f"| {layer} | {head} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
