"""Capture of video diffusion transformers: one denoising call, with the latent grid and the sampler's timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import Dim

from .capture import MAIN, Captured, as_captured, config_of, export_module
from .errors import InvalidArgument
from .patterns.graph import GraphView
from .patterns.grid import find_grid
from .patterns.steps import checked_timesteps


def capture_denoiser(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    timestep: str = "timestep",
    timesteps: Sequence[float] | Tensor | None = None,
    grid: Sequence[int | None] | None = None,
    dynamic_frames: bool = False,
) -> Captured:
    """Capture a diffusers video transformer, called with keywords and `return_dict=False`.

    Args:
        model: `WanTransformer3DModel`, `CogVideoXTransformer3DModel` and the like.
        inputs: Example keyword inputs, `hidden_states` [batch, channels, frames, height, width] among them.
        timestep: Name of the input that carries the denoising step.
        timesteps: Its value at each step of a sampling run, falling; `scheduler.timesteps` of a diffusers pipeline.
            Methods that treat early steps in another way find the steps by it. By default 50 even steps from 1000
            down, which shifted schedules are not.
        grid: The latent grid (frames, height, width) in tokens, for models whose graph does not prove it; methods check
            it against the length of the sequence. None for what is dynamic.
        dynamic_frames: Keep the number of frames dynamic, as far as the model allows; at least 2 in the example.

    Returns:
        The captured program; `facts["grid"]` is the latent grid in tokens, given or proved, sizes that stay dynamic as
        None.

    Raises:
        InvalidArgument: There is no such timestep input, the timesteps do not fall, or the grid contradicts the graph.
        CaptureError: The model could not be exported.
    """
    inputs = {name: value for name, value in inputs.items() if name != "return_dict"}
    if timestep not in inputs:
        raise InvalidArgument(f"no input is called {timestep!r}; the inputs are {', '.join(inputs)}")
    steps = None if timesteps is None else checked_timesteps(timesteps)
    dynamic = _dynamic_frames(inputs, model) if dynamic_frames else None
    wrapper = _Denoiser(model, tuple(inputs))
    exported = export_module(wrapper.eval(), (), {"inputs": dict(inputs)}, {"inputs": dynamic} if dynamic else None)
    facts = {
        "timestep": timestep,
        "timesteps": steps,
        "grid": _grid(GraphView(exported), grid),
        "config": config_of(model),
    }
    return as_captured(exported, tuple(inputs), (MAIN,), "denoiser", facts)


def _grid(view: GraphView, given: Sequence[int | None] | None) -> list[int | None] | None:
    found = find_grid(view)
    if given is None:
        return list(found.sizes) if found else None
    if len(given) != 3 or any(size is not None and size < 1 for size in given):
        raise InvalidArgument(f"grid must be (frames, height, width) in tokens, got {tuple(given)}")
    if found and any(a is not None and b is not None and a != b for a, b in zip(given, found.sizes, strict=True)):
        raise InvalidArgument(f"got the grid {tuple(given)}, the graph has {found.sizes} ({', '.join(found.evidence)})")
    return list(given)


def _dynamic_frames(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Dynamic shapes for the latents, and for rotary tables that are handed in and have a row for each token."""
    axis = _frame_axis(inputs["hidden_states"], model)
    return {
        name: {axis: Dim.DYNAMIC}
        if name == "hidden_states"
        else tuple({0: Dim.DYNAMIC} for _ in value)
        if isinstance(value, tuple) and all(isinstance(part, Tensor) and part.dim() == 2 for part in value)
        else None
        for name, value in inputs.items()
    }


def _frame_axis(hidden_states: Tensor, model: nn.Module) -> int:
    """CogVideoX orders its latents [batch, frames, channels, ...], the others [batch, channels, frames, ...]."""
    channels = getattr(getattr(model, "config", None), "in_channels", None)
    return 1 if hidden_states.shape[2] == channels and hidden_states.shape[1] != channels else 2


class _Denoiser(nn.Module):
    """Calls a denoiser with keywords and takes the sample out of the tuple."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        return self.model(**inputs, return_dict=False)[0]
