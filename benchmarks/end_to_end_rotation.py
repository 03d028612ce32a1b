"""The costly way to a rotation, for comparison: learn R1 and R2 end to end, by Cayley SGD on the model's loss.

Every linear reads Q(x R) R^T, with the gradient of the rounding Q taken as 1, and all rotations follow the gradient of
the next-token loss through the whole model (SpinQuant, Liu et al. 2024, arXiv:2405.16406: weights in full precision
where GPTQ follows). The rotation is applied to the activations alone, which gives the numbers of the folded model: the
weights' rotations cancel.

Cayley SGD (Li et al. 2020, arXiv:2002.01113): R <- (I - a/2 A)^-1 (I + a/2 A) R with A the skew part of -G R^T.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from graphwright.kernels.hadamard import matrix
from graphwright.kernels.hadamard import reference as hadamard
from graphwright.kernels.token_grid import quantize_tokens
from graphwright.passes.dialects import graph_arguments
from graphwright.patterns.find import Sites
from graphwright.patterns.graph import GraphView
from graphwright.patterns.value_path import ValuePath, find_value_path, per_head


def cayley_step(rotation: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """One step along the manifold of orthogonal matrices [.., n, n]."""
    product = gradient @ rotation.mT
    skew = product.mT - product
    half = lr / 2 * skew
    eye = torch.eye(rotation.shape[-1])
    return torch.linalg.solve(eye - half, (eye + half) @ rotation)


def rounded(x: Tensor, bits: int, clip: float) -> Tensor:
    """Activations rounded per token; the gradient passes as if they were not."""
    with torch.no_grad():
        values, step, _ = quantize_tokens(x.reshape(-1, x.shape[-1]), bits, clip)
        difference = (values * step).view(x.shape) - x
    return x + difference


class QuantizedModel(Interpreter):
    """A language model's prefill whose linears read rotated, rounded activations, differentiable in the rotations."""

    def __init__(self, exported: ExportedProgram, sites: Sites, bits: int, clip: float) -> None:
        super().__init__(exported.graph_module)
        self.exported, self.bits, self.clip = exported, bits, clip
        self.change: dict[Node, Callable[[Tensor], Tensor]] = {}
        (self.stream,) = sites.residual
        view = GraphView(exported)
        self.bare = {norm for norm, _ in self.stream.norms}
        self.gain = {linear: view.tensor(norm.args[2]) for norm, linears in self.stream.norms for linear in linears}
        self.stream_rotation = torch.empty(0)
        self.head_rotations: dict[Node, Tensor] = {}
        self.paths: dict[Node, ValuePath] = {}
        for site in sites.attention:
            path = find_value_path(view, site)
            assert isinstance(path, ValuePath)
            self.paths[path.output] = path
        quantized = {site.node: site.role for site in sites.linear if site.role != "head"}
        for node, role in quantized.items():
            self.change[node] = self._heads(node) if role == "o" else self._online if role == "down" else self._stream

    def _round(self, x: Tensor) -> Tensor:
        return rounded(x, self.bits, self.clip)

    def _stream(self, x: Tensor) -> Tensor:
        return self._round(x @ self.stream_rotation) @ self.stream_rotation.t()

    def _online(self, x: Tensor) -> Tensor:
        # The Hadamard matrix is orthogonal and not symmetric: it is undone by its transpose.
        return self._round(hadamard(x)) @ matrix(x.shape[-1]).float().t()

    def _heads(self, node: Node) -> Callable[[Tensor], Tensor]:
        heads = self.paths[node].heads

        def change(x: Tensor) -> Tensor:
            blocks = per_head(self.head_rotations[node], heads)
            y = self._round(torch.einsum("bthe,hed->bthd", x.unflatten(-1, (heads, -1)), blocks).flatten(2))
            return torch.einsum("bthd,hed->bthe", y.unflatten(-1, (heads, -1)), blocks).flatten(2)

        return change

    def run_node(self, n: Node) -> Any:
        """Norms of the stream give bare rows; gains follow the rotated, rounded rows, as in the folded model."""
        if n in self.bare:
            (x, shape, _, eps), _ = self.fetch_args_kwargs_from_env(n)
            return torch.nn.functional.rms_norm(x, shape, None, eps)
        if n in self.change or n in self.gain:
            (x, *rest), _ = self.fetch_args_kwargs_from_env(n)
            x = self.change[n](x) if n in self.change else x
            return torch.nn.functional.linear(x * self.gain[n] if n in self.gain else x, *rest)
        return super().run_node(n)

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of the next token, [1, T]."""
        flat = [tokens, torch.arange(tokens.shape[1])]
        logits = self.run(*graph_arguments(self.exported, flat), enable_io_processing=False)[-1]
        return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])


def learn(
    model: QuantizedModel, start: Tensor, heads: Mapping[Node, Tensor], texts: Tensor, steps: int, lr: float
) -> tuple[Tensor, dict[Node, Tensor], list[float]]:
    """Learn all rotations, one text [1, T] a step, the learning rate falling linearly to zero.

    Returns:
        R1, R2 by output projection, and the seconds after each step.
    """
    rotations = [start.clone(), *(heads[node].clone() for node in heads)]
    seconds = []
    began = time.perf_counter()
    for step in range(steps):
        for rotation in rotations:
            rotation.requires_grad_()
        model.stream_rotation = rotations[0]
        model.head_rotations = dict(zip(heads, rotations[1:], strict=True))
        with torch.enable_grad():
            gradients = torch.autograd.grad(model.loss(texts[step % len(texts)][None]), rotations)
        rate = lr * (1 - step / steps)
        rotations = [cayley_step(r.detach(), g, rate) for r, g in zip(rotations, gradients, strict=True)]
        seconds.append(time.perf_counter() - began)
    return rotations[0], dict(zip(heads, rotations[1:], strict=True)), seconds
